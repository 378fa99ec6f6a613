"""Responses for people to read, in a page: thinking apart, the box found, long texts cut with their length said."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from lab.metrics import read_rows
from reward import BOX

MOST_CHARACTERS = 6000  # of a text in a page: from there on its middle is left out
PROBLEMS_SHOWN = 4  # held-out ones
TOPICS = {"rescued": "rescued groups", "substituted": "substituted groups", "": "other groups of training"}


def shorten(text: str) -> str:
    """Leave out the middle of a long text, and say how much that is."""
    head, tail = MOST_CHARACTERS * 3 // 4, MOST_CHARACTERS // 4
    if len(text) <= head + tail:
        return text
    return f"{text[:head]}\n[… {len(text) - head - tail:,} more characters, not shown …]\n{text[-tail:]}"


def transcript(response: Mapping) -> dict:
    """Return a response with its text in parts: `thinking`, and what comes `before` and `after` its `box`.

    Without a box and an end of thinking, all of it is `thinking`.
    """
    text, answer, box = str(response["text"]), response.get("answer"), None
    thinking, tag, body = text.rpartition("</think>")
    if answer is not None:
        *_, box = None, *re.finditer(f"{BOX.pattern}{re.escape(answer)}}}", body)
    if box is None and not tag:
        thinking, body = text, ""
    start, end = box.span() if box else (len(body), len(body))
    before, after = body[:start].lstrip(), body[end:].rstrip()
    parts = {"thinking": thinking.strip(), "before": before, "box": body[start:end], "after": after}
    parts = {name: shorten(part) for name, part in parts.items()}
    return {**response, **parts, "cut": response.get("finish_reason") == "length", "length": len(thinking)}


def groups_to_read(path: Path, stages: Mapping[int, str]) -> dict:
    """Return the first and the last group of each topic and stage of rollouts.jsonl, and what they can be filtered by.

    A topic is a held-out problem or a fate in training. A group's `marks` name its stage, and "ends" if it is the first
    or the last of its topic.
    """
    kept: dict[str, dict[int, list[dict]]] = {}  # by topic and stage
    for _, row in read_rows(path) if path.exists() else ():
        if row.get("responses"):
            topic = TOPICS.get(row.get("fate", "")) if row.get("kind") == "training" else str(row["problem_id"])
            kept.setdefault(topic, {}).setdefault(row["stage"], [])[1:] = [row]  # the first stays
    fixed = [topic for topic in kept if topic not in TOPICS.values()]
    topics = [*fixed[:PROBLEMS_SHOWN], *(topic for topic in TOPICS.values() if topic in kept)]
    shown, verdicts = [], Counter()
    for topic in topics:
        rows = [row for stage in kept[topic].values() for row in stage]
        groups = []
        for row in rows:
            responses = [transcript(response) for response in row["responses"]]
            verdicts.update(str(response.get("verdict")) for response in responses)
            ends = "ends" if row is rows[0] or row is rows[-1] else ""
            groups.append(row | {
                "marks": f"stage-{row['stage']} {ends}",
                "when": f"{stages.get(row['stage'], row['stage'])}, step {row['step']:,}",
                "right": sum(response.get("verdict") == "right" for response in responses),
                "prompt": shorten(str(row.get("prompt"))),
                "replacement": shorten(str(row.get("replacement", ""))),
                "responses": responses,
            })  # fmt: skip
        shown.append((topic, groups))
    used = sorted({row["stage"] for _, groups in shown for row in groups})
    return {
        "topics": shown,
        "verdicts": [verdict for verdict, _ in verdicts.most_common()],
        "stages": {stage: stages.get(stage, f"stage {stage}") for stage in used},
        "others": len(fixed) - len(fixed[:PROBLEMS_SHOWN]),
    }
