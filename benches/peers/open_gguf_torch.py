"""From a GGUF file to a model that is ready to run, with transformers: seconds. `python open_gguf_torch.py FILE.gguf`"""

import sys
import time
from pathlib import Path

from common import prepare, report

prepare(2)
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402  (importing is not what is measured)

path = Path(sys.argv[1])
began = time.perf_counter()
AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
report(bench="open_gguf", seconds=round(time.perf_counter() - began, 2))
