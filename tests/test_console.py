"""console.py: lines align and fit, and times are short."""

import math

import pytest

from lab import console


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0m 00s"),
        (185.4, "3m 05s"),
        (3599.7, "1h 00m"),
        (7860, "2h 11m"),
        (86_400 * 4 + 3 * 3600, "4d 03h"),
        (math.nan, "?"),
        (math.inf, "?"),
        (-1, "?"),
    ],
)
def test_format_eta(seconds, text):
    assert console.format_eta(seconds) == text


def test_console_lines_align_and_fit():
    rl = dict(
        kind="rl",
        step=123,
        stage=1,
        reward_mean=0.512,
        response_length_mean=1234.5,
        truncated_share=0.031,
        distinct4=0.7123,
        temperature=1.4,
        zero_variance=12,
        groups=128.0,
        rescued=1.0,
        substituted=12,
        tokens=90_000,
        seconds=10.0,
        seconds_grade=0.123,
    )
    extreme = dict(
        rl,
        step=10_000,
        stage=12,
        reward_mean=-123456.0,
        response_length_mean=98304.0,
        truncated_share=1.0,
        zero_variance=128,
        rescued=128,
        substituted=1000,
        tokens=9e9,
    )
    lines = [
        console.console_line(row, 10_000, 7860)
        for row in (
            rl,
            extreme,
            dict(rl, skipped=1),
            dict(rl, reward_mean=math.nan),
            dict(kind="rl", step=1, stage=1),
            dict(kind="sft", step=7, stage=0, loss=2.31, tokens_per_s=9123.4),
            dict(kind="sft", step=8, stage=0, loss=None),
        )
    ]
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 160
    assert len({line.index(" tok/s") for line in lines}) == 1
    assert (
        lines[0].split()
        == (
            "1 rl 123/10000 reward 0.512 len 1234 trunc 3.1% d4 0.712 T 1.40 zerovar 12/128 "
            "rescued 1 subst 12 9000 tok/s grade 1.2% eta 2h 11m"
        ).split()
    )
    assert "update skipped" in lines[2] and "nan" in lines[3] and "loss    2.310" in lines[5]
