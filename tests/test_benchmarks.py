"""lab/benchmarks.py: finding data by name, and the table of published results."""

import pytest

from eval import Response
from lab.benchmarks import BENCHMARKS, PUBLISHED, find_data, published_table, text_table
from lab.data_files import DataError
from lab.problems import Problem
from lab.scores import summarise


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def test_a_name_is_searched_for_in_the_folder_and_then_on_the_hub(tmp_path):
    touch(tmp_path, "benchmarks/aime24.parquet", "gsm8k/train.jsonl", "gsm8k/test.jsonl", "math/math500.json")
    found = find_data(["aime24", "gsm8k", "math500", "minerva"], tmp_path)
    assert found == {
        "aime24": str(tmp_path / "benchmarks/aime24.parquet"),
        "gsm8k": str(tmp_path / "gsm8k/test.jsonl"),
        "math500": str(tmp_path / "math/math500.json"),
        "minerva": "math-ai/minervamath:test",
    }
    assert find_data(["aime24"])["aime24"] == "HuggingFaceH4/aime_2024:train"


def test_files_folders_and_hub_ids(tmp_path):
    touch(tmp_path, "a/one.jsonl", "a/two.parquet", "a/notes.txt", "b/one.jsonl")
    assert find_data([str(tmp_path / "a")]) == {
        "one": str(tmp_path / "a/one.jsonl"),
        "two": str(tmp_path / "a/two.parquet"),
    }
    both = find_data([str(tmp_path / "a/one.jsonl"), str(tmp_path / "b/one.jsonl"), "owner/name:test"])
    assert list(both) == ["one", str(tmp_path / "b/one.jsonl"), "name"]


@pytest.mark.parametrize(
    "sources, sentence",
    [
        (
            ["aime42"],
            r"aime42 is not a file, .* a known benchmark \(did you mean aime2[45]\?\); known are aime24, aime25, ",
        ),
        (["nothing like it"], "a known benchmark; known are aime24, .*, gsm8k"),
        (["{tmp}/a/one.jsonl", "{tmp}/a/one.jsonl", "{tmp}/a/one.jsonl"], "is given twice"),
        (["{tmp}/a/one.jsonl", "{tmp}/b/../a/one.jsonl"], "is given twice"),
        (["{tmp}/b"], "another data set is also named foo-bar; rename one of the files"),
        (["{tmp}/empty"], "has no .parquet, .jsonl, .json, .csv"),
    ],
)
def test_an_unusable_source_is_one_sentence(tmp_path, sources, sentence):
    touch(tmp_path, "a/one.jsonl", "b/foo bar.jsonl", "b/foo-bar.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=sentence) as raised:
        find_data([source.format(tmp=tmp_path) for source in sources])
    assert "\n" not in str(raised.value)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a folder; give the one with the benchmark files"):
        find_data(["aime24"], tmp_path / "nowhere")


def evaluation(name, rights):
    groups = [[Response(name, str(i), 0, 1, "stop", "right" if r else "wrong", "1", "")] for i, r in enumerate(rights)]
    return summarise(name, [Problem(str(i), "?", ("1",)) for i in range(len(rights))], groups, 1.0, 10)


def test_measured_rows_follow_the_published_ones():
    table = published_table(
        {"mine": [evaluation("mine-set", [1, 0]), evaluation("aime25", [1] * 9 + [0])], "mine, YaRN": []}
    )
    head, *rows = table
    assert head == ["model", "mine-set", "AIME25 avg@32"]  # what was measured, and nothing else
    assert [row[0] for row in rows] == [*PUBLISHED, "mine (measured here)", "mine, YaRN (measured here)"]
    assert rows[5] == ["POLARIS-4B", "-", "79.4"]
    assert rows[6][1].startswith("50.0 [") and rows[6][2].startswith("90.0 [52.5, 98.7] @1")
    assert all(len(row) == len(head) for row in rows)
    lines = text_table(table).splitlines()
    assert rows[7][1:] == ["-"] * 2 and len(lines) == 10 and len({len(line) for line in lines}) == 1
    alone = published_table({"mine": [evaluation("mine-set", [1, 0]), evaluation("gsm8k", [1])]})
    assert alone[0] == ["model", "mine-set", "GSM8K"] and [row[0] for row in alone[1:]] == ["mine (measured here)"]


def test_the_published_figures_are_those_of_the_recipe():
    """By the column sums of the table in RECIPE.md section 6."""
    sums = [round(sum(scores[i] for scores in PUBLISHED.values()), 1) for i in range(5)]
    assert sums == [397.8, 327.1, 238.3, 372.4, 514.3]
    assert [b.published_k for b in BENCHMARKS.values()] == [32, 32, 4, 4, 8, None, None]


def test_a_folder_of_shards_is_one_data_set(tmp_path):
    touch(tmp_path, "set/data/train-00000-of-00002.parquet", "set/data/train-00001-of-00002.parquet")
    assert find_data([str(tmp_path / "set")]) == {"set": str(tmp_path / "set")}
    assert find_data([str(tmp_path / "set" / "data")]) == {"data": str(tmp_path / "set" / "data")}
    touch(tmp_path, "set/dataset_infos.json")  # beside the data/ of a cloned hub data set
    assert find_data([str(tmp_path / "set")]) == {"set": str(tmp_path / "set")}
    assert find_data([f"{tmp_path / 'set'}:test"]) == {"set": f"{tmp_path / 'set'}:test"}
