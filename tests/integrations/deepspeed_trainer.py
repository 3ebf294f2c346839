"""Train with a Trainer and DeepSpeed in one process: with the callback or, if that is refused, with its remedy.

Arguments: a free port, the stage of ZeRO, a folder. Prints the error, and the difference from a loop by hand.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the imports below read these; pytest imports this file too, to look for doctests
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")

from tests.integrations.hand_written import difference
from tests.integrations.hugging_face import build, train_by_hand, trainer

# isort: split
import deepspeed

import gradcentral
from gradcentral.integrations.transformers import GradientCentralization


def main(port: str, stage: str, folder: str) -> None:
    """Train for four steps."""
    os.environ["MASTER_PORT"] = port
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined] # it would be compiled
    arguments: dict[str, Any] = {
        "use_cpu": False,  # with True, accelerate would not use DeepSpeed
        "max_grad_norm": 0.2,
        "deepspeed": {
            "zero_optimization": {"stage": int(stage)},
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": "auto",
        },
    }
    model = build()
    trained = trainer(Path(folder), model, GradientCentralization(), **arguments)
    refused = False
    try:
        trained.train()
    except ValueError as error:
        print("refused:", error)
        refused, model = True, build()
        gradcentral.centralize_in_backward(model)
        trainer(Path(folder), model, **arguments).train()
    with deepspeed.zero.GatheredParameters([*model.parameters()]):
        print("difference:", difference(model, train_by_hand(build(), steps=4, clip=0.2, clip_last=refused)))


if __name__ == "__main__":
    main(*sys.argv[1:])
