"""benchmarks/gpu.py on a machine without a GPU."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_cuda_device_the_suggested_option_runs_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = runpy.run_path(str(SCRIPT))
    main = script["main"]
    for slow in ("tests", "iteration", "settings"):
        monkeypatch.setitem(main.__globals__, slow, lambda run: {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        main()
    found = re.search(r"no CUDA device; (--[\w-]+)", str(caught.value))
    assert found is not None
    sys.argv.append(found[1])
    main()
    results = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert results["complete"]
    assert [case["algorithm"] for case in results["steps"]["cases"]] == ["SGD", "AdamW"]
