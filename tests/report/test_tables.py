"""Tables of a run and of a preview, word for word."""

from typing import Any

from erpd_lightning.report.tables import format_preview, format_summary


def measured(pass_at_1: float, kl: float) -> dict[str, Any]:
    return {
        "pass@1": pass_at_1,
        "pass@1_stderr": 0.0123,
        "pass@k": 0.8,
        "kl_per_token": kl,
        "kl_per_token_stderr": 0.00125,
        "kl_per_response": 14 * kl,
        "kl_per_token_to_first": 2 * kl,
        "entropy_per_token": 0.25,
        "mean_length": 14.0,
        "prompts": 320,
        "samples_per_prompt": 8,
    }


SUMMARY: dict[str, Any] = {
    "rounds": [
        {
            "round": 1,
            "budget": 0.05,
            "beta": 1.6234567,
            "rollouts": 4096,
            "rollouts_total": 4096,
            "seconds": 61.7,
            "policies": {
                "base": measured(0.38, 0.0),
                "teacher": measured(0.4004, 0.376),
                "unlearned": measured(0.1, 1.25),
                "student": measured(0.657, 0.04515),
            },
        },
        {
            "round": 2,
            "budget": None,
            "beta": 2.0,
            "rollouts": 4096,
            "rollouts_total": 8192,
            "seconds": 9.2,
            "policies": {"base": measured(0.657, 0.0), "student": measured(1.0, 0.05)},
        },
    ]
}

TABLE = """\
round     policy         pass@1  pass@k         KL/token  KL/response  KL/token to first  entropy  rollouts  seconds
--------------------------------------------------------------------------------------------------------------------
    1       base  0.380 ± 0.012   0.800  0.0000 ± 0.0013         0.00             0.0000    0.250
    1    teacher  0.400 ± 0.012   0.800  0.3760 ± 0.0013         5.26             0.7520    0.250
    1  unlearned  0.100 ± 0.012   0.800  1.2500 ± 0.0013        17.50             2.5000    0.250
    1    student  0.657 ± 0.012   0.800  0.0452 ± 0.0013         0.63             0.0903    0.250      4096       62
    2       base  0.657 ± 0.012   0.800  0.0000 ± 0.0013         0.00             0.0000    0.250
    2    student  1.000 ± 0.012   0.800  0.0500 ± 0.0013         0.70             0.1000    0.250      8192        9
Round 1: budget 0.05 nats per token, 0.0452 spent (90%), beta 1.623
Round 2: beta 2 given, 0.0500 nats per token spent"""


def test_the_table() -> None:
    assert format_summary(SUMMARY) == TABLE


def test_the_line_of_a_round_shows_what_min_beta_left_of_the_budget() -> None:
    (entry, _) = SUMMARY["rounds"]
    held, free = ({**entry, "effective_budget": effective} for effective in (0.0473, 0.05))
    lines = format_summary({"rounds": [held, free]}).splitlines()[-2:]
    line = "Round 1: budget 0.05 nats per token{}, 0.0452 spent (90%), beta 1.623"
    assert lines == [line.format(", min_beta left 0.0473"), line.format("")]


def test_columns_widen_with_what_they_hold() -> None:
    """A KL of three digits before the point, and what a single prompt cannot tell."""
    policies = {"student": {**measured(0.5, 123.4), "pass@1_stderr": float("nan")}}
    entry = {**SUMMARY["rounds"][0], "policies": policies}
    header, rule, row, budget = format_summary({"rounds": [entry]}).splitlines()
    assert len(header) == len(rule) == len(row)
    assert "0.500 ± nan" in row
    assert "123.4000 ± 0.0013" in row
    assert budget.startswith("Round 1: budget 0.05 nats per token, 123.4000 spent (246800%)")
    for name in ("KL/token", "KL/response", "seconds"):
        end = header.index(name) + len(name)
        assert row[end - 1] != " "
        assert row[end : end + 1] in ("", " ")


PREVIEWS: list[dict[str, Any]] = [
    {**measured(0.5, 0.02345), "candidate": "teacher/unlearned", "budget": 0.025, "beta": 3.14159, "samples": 2560},
    {**measured(0.61234, 0.5), "candidate": "teacher", "budget": None, "beta": 1.0, "samples": 2560},
]
for row, stored in zip(PREVIEWS, (0.025, 0.4567), strict=True):
    row["kl_on_stored_states"] = stored

PREVIEW_TABLE = """\
        candidate  budget   beta  KL on stored states         pass@1         KL/token  entropy  length  samples
---------------------------------------------------------------------------------------------------------------
teacher/unlearned   0.025  3.142               0.0250  0.500 ± 0.012  0.0234 ± 0.0013    0.250    14.0     2560
          teacher              1               0.4567  0.612 ± 0.012  0.5000 ± 0.0013    0.250    14.0     2560
             base                                      0.380 ± 0.012  0.0000 ± 0.0013    0.250    14.0     2560"""


def test_the_table_of_a_preview() -> None:
    assert format_preview(PREVIEWS, {"base": measured(0.38, 0.0)}) == PREVIEW_TABLE
