"""How fast answers are checked, and what checks that hang cost.

    python benchmarks/verifier_pool.py [--checks 500] [--hanging 0.05] [--timeout 10]

Prints checks a second of `MathVerify` on distinct answers, and the seconds that as many checks take of which some hang:
asleep, or computing for ever. Figures are with the processes started; the first check costs their start.
"""

import argparse
import time

from erpd_lightning.data.verifiers import ExactMatch, MathVerify

ENDLESS = "a" * 60
"""What the pattern below takes for ever on."""


def seconds(
    check: MathVerify | ExactMatch, responses: list[str], answers: list[str]
) -> tuple[float, list[float | None]]:
    """How long a verifier takes, and its verdicts."""
    start = time.perf_counter()
    verdicts = check(responses, answers)
    return time.perf_counter() - start, verdicts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", type=int, default=500)
    parser.add_argument("--hanging", type=float, default=0.05)
    parser.add_argument("--timeout", type=float, default=10.0)
    options = parser.parse_args()
    count = options.checks

    maths = MathVerify(timeout=options.timeout)
    taken, _ = seconds(maths, [r"\boxed{1}"], ["1"])
    print(f"start and first check: {taken:.2f} s")
    numbers = [rf"\boxed{{\frac{{{n}}}{{7}} + \sqrt{{{n % 11 + 2}}}}}" for n in range(count)]
    taken, verdicts = seconds(maths, numbers, [number[7:-1] for number in numbers])
    assert verdicts == [1.0] * count
    print(f"MathVerify: {count} checks in {taken:.2f} s, {count / taken:.0f} a second")

    every = max(1, round(1 / options.hanging)) if options.hanging else count + 1
    hangs = [number % every == every - 1 for number in range(count)]
    pattern = ExactMatch("(?:a+)+(b)", timeout=options.timeout)
    seconds(pattern, ["ab"], ["b"])
    taken, verdicts = seconds(pattern, [ENDLESS if hang else "aab" for hang in hangs], ["b"] * count)
    assert verdicts == [None if hang else 1.0 for hang in hangs], "a check that does not hang got no verdict"
    print(
        f"ExactMatch: {count} checks of which {sum(hangs)} compute for ever in {taken:.2f} s "
        f"({taken / options.timeout:.2f} time limits of {options.timeout:g} s)"
    )


if __name__ == "__main__":
    main()
