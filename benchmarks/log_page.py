"""The picture of the log's page in docs/log.md: notes written here, served, and drawn by Chromium.

python -m benchmarks.log_page            # writes docs/images/log_page.png
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import uvicorn
from PIL import Image

from modgraft.log import Log
from modgraft.log.serve.page import app

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "log_page.png"
PORT = 8766

NOTES = {
    "2024-03-11_adapters.md": """\
## tl;dr
Three ways to change a layer; what they cost decides, not what they can do.

## Context
Before choosing one: what does each way of changing a layer cost, and what is it good for?

## Learned
- [lesson_learned -> compare at equal numbers of trained weights, never at the papers' own settings]

## Next?
- [eureka -> one router over modules of different kinds]

## Log
- [skim(@houlsbyParameterEfficient2019) -> _full_read]
  - Two bottlenecks a layer, in series: simple, and it costs time at every call.
- [read(@huLoRA2021)]
  - $W' = W + \\frac{\\alpha}{r} B A$, and $B = 0$ at the start: born as the identity.
  - Merged, it costs nothing. [question -> and with three of them at once?]
- [skim(@pfeifferAdapterFusion2021) -> _digging]
- [question -> does the rank matter below a thousand examples?]
  - Try ranks 2 and 8, three seeds each, before reading on.
- [calculate(2 * 8 * 768) -> 12288]
""",
    "2024-03-14_routing.md": """\
## tl;dr
To be found out: is picking a module easier than blending them?

## Log
- [interrupt(the disk was full)]
- [hypothesize -> examples of one topic need one module, and tokens need two]
- [code(a router that is told the topic) -> [routing](2024-03-11_adapters.md)]
- [soliloquy]
  - A router that always picks the same module has learned the loss, not the task.
- [question -> is a balanced router a better one?]
- [lesson_learned -> look at what the router picked before looking at the score]
""",
}
SOURCES = """\
@inproceedings{houlsbyParameterEfficient2019, title = {Parameter-Efficient Transfer Learning for
  {NLP}}, author = {Houlsby, Neil and others}, year = {2019}}
@article{huLoRA2021, title = {{LoRA}: Low-Rank Adaptation of Large Language Models},
  author = {Hu, Edward J. and others}, year = {2021}, url = {https://arxiv.org/abs/2106.09685}}
@inproceedings{pfeifferAdapterFusion2021, title = {{AdapterFusion}: Non-Destructive Task
  Composition for Transfer Learning}, author = {Pfeiffer, Jonas and others}, year = {2021}}
"""


def main() -> None:
    """Write the picture."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no Chromium: install it, or leave the picture as it is")
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "log"
        folder.mkdir()
        for name, text in NOTES.items():
            (folder / name).write_text(text, "utf-8")
        (folder / "sources.bib").write_text(SOURCES, "utf-8")
        server = uvicorn.Server(uvicorn.Config(app(Log.open(folder)), port=PORT, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        drawn = Path(home) / "page.png"
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1120,1010",
             f"--screenshot={drawn}", f"--user-data-dir={home}/browser",
             f"http://127.0.0.1:{PORT}/note/2024-03-11_adapters.md?line=17"],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        server.should_exit = True
        thread.join()
        # A page of text has few colours; 128 of them show it as it is, at a third of the size.
        Image.open(drawn).convert("RGB").quantize(128).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
