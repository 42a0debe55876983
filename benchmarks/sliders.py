"""``python -m benchmarks.sliders``: the time from a turn of a slider on the page until the new drawing stands on it.

A headless Chromium opens the page of a server on the same machine, chooses a picture, and turns the sliders of the
pose, one step after the other. A step ends when the page has replaced its drawings, in the frame that shows them.
Needs Playwright and Chromium.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import origin, write

RESULTS = Path(__file__).parent / "results" / "sliders-cpu.csv"
CHROMIUM = Path("/usr/bin/chromium")
_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
_MODEL = "capsnet-mnist"
_WARM_UP = 10  # steps before those that count
# Turns a slider back and forth, and returns the milliseconds of each step: until the drawing's pixels are on its
# canvas, and until the next frame.
_TURN = """async ([steps, warmUp]) => {
    const holder = document.querySelector("#pictures");
    const sliders = [...document.querySelectorAll("#sliders input")];
    const times = [];
    for (let step = 0; step < warmUp + steps; step++) {
        const slider = sliders[step % sliders.length];
        const span = Number(slider.max) - Number(slider.min);
        slider.value = Number(slider.min) + span * (0.2 + 0.6 * ((step * 7) % 11) / 10);
        const drawn = new Promise((resolve) => {
            const observer = new MutationObserver(() => { observer.disconnect(); resolve(performance.now()); });
            observer.observe(holder, { childList: true });
        });
        const began = performance.now();
        slider.dispatchEvent(new Event("input", { bubbles: true }));
        const ended = await drawn;
        const shown = await new Promise((resolve) => requestAnimationFrame(() => resolve(performance.now())));
        if (step >= warmUp) times.push([ended - began, shown - began]);
    }
    return times;
}"""


def measure(address: str, steps: int) -> list[tuple[float, float]]:
    """Return the milliseconds of each step until the drawing stands on its canvas, and until the next frame."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        page = chromium.new_page()
        page.goto(address)
        page.wait_for_selector("#model:enabled")
        page.select_option("#model", label=f"{_MODEL} 1")
        page.locator("#shelf button", has_text="a 7").first.click()
        page.wait_for_selector("#sliders input")
        page.wait_for_timeout(1500)  # until the relevance of the picture is answered
        times: list[tuple[float, float]] = page.evaluate(_TURN, [steps, _WARM_UP])
        chromium.close()
    return times


def row(times: list[tuple[float, float]]) -> dict[str, Any]:
    """Return the figures of the steps by column."""
    figures: dict[str, Any] = {"model": _MODEL, "steps": len(times)}
    for name, values in zip(("drawn", "frame"), np.array(times).T, strict=True):
        p50, p95 = np.quantile(values, [0.5, 0.95])
        figures |= {
            f"{name}_p50_ms": f"{p50:.1f}",
            f"{name}_p95_ms": f"{p95:.1f}",
            f"{name}_max_ms": f"{max(values):.1f}",
        }
    return figures


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.sliders", description=__doc__)
    command.add_argument("address", help="the page of a running server, such as http://127.0.0.1:8000/")
    command.add_argument("--steps", type=int, default=50, help="steps that count (default: %(default)s)")
    command.add_argument("--results", type=Path, default=RESULTS, help="the results file")
    options = command.parse_args(arguments)
    figures = row(measure(options.address, options.steps))
    write(options.results, [figures | origin()])
    print(*[f"{name} {value}" for name, value in figures.items()], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
