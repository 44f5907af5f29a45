"""Lightning on the XLA device, with logging, checkpoints and progress off.

Its XLA accelerator admits TPUs only; told that a device is there, it runs on XLA:CPU as well.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable

from step_contenders.workloads import WORKLOADS, loss_of

NEEDS = ("torch_xla", "lightning")
NUM_WARM_UP = 5


def prepare(workload_name: str) -> Callable[[int], float]:
    import lightning.fabric.accelerators.xla as fabric_xla
    import lightning.pytorch as pl
    import torch_xla.core.xla_model as xm
    from lightning.pytorch.accelerators import XLAAccelerator
    from lightning.pytorch.strategies import SingleDeviceXLAStrategy

    from step_contenders.stream import make_loader

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for accelerator in (fabric_xla.XLAAccelerator, XLAAccelerator):
        accelerator.is_available = staticmethod(lambda: True)
        accelerator.auto_device_count = staticmethod(lambda: 1)

    workload = WORKLOADS[workload_name]
    batches = workload.batches()

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = workload.build_seeded()
            self.begun = 0.0

        def training_step(self, batch, batch_idx):
            return loss_of(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return workload.make_optimizer(self.parameters())

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == NUM_WARM_UP - 1:
                xm.wait_device_ops()
                self.begun = time.perf_counter()

    module = Module()

    def measure(num_steps: int) -> float:
        total = NUM_WARM_UP + num_steps
        pl.Trainer(accelerator=XLAAccelerator(), strategy=SingleDeviceXLAStrategy(device=0), devices=1, max_steps=total,
                   logger=False, enable_checkpointing=False, enable_progress_bar=False,
                   enable_model_summary=False).fit(module, make_loader(batches, total))
        xm.wait_device_ops()
        return (time.perf_counter() - module.begun) / num_steps * 1e3

    return measure
