"""The sample model: a small hybrid that is really trained, so that quality can be measured.

`checkpoint/` is a Hugging Face directory (bf16, 7.9 M parameters, four Mamba, three MoE and two
attention layers) trained by `train.py` on the Python standard library's own sources; `corpus.json`
lists the files, and which of them were held out. `evaluate.py` measures bits per byte on those.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).with_name("checkpoint")
