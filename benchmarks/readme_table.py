"""Bring the README's measured figures in step with the newest files in benchmarks/results/."""

from __future__ import annotations

from reporting import README, with_results


def main() -> None:
    """Rewrite the regions between the README's ``benchmark:`` marks."""
    before = README.read_text(encoding="utf-8")
    after = with_results(before)
    if after == before:
        print(f"{README.name} says what the results say")
        return
    README.write_text(after, encoding="utf-8", newline="\n")
    print(f"{README.name} is brought in step with the results")


if __name__ == "__main__":
    main()
