"""Bring the measured figures in README and docs/ in step with the newest of benchmarks/results/."""

from __future__ import annotations

from reporting import PAGES, ROOT, with_results


def main() -> None:
    """Rewrite the regions between the pages' ``benchmark:`` marks."""
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = with_results(before)
        if after != before:
            page.write_text(after, encoding="utf-8", newline="\n")
            print(f"{page.relative_to(ROOT)} is brought in step with the results")


if __name__ == "__main__":
    main()
