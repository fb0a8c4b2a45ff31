"""Optimizers and schedules."""

from __future__ import annotations

import torch
from torch import nn

from distinit_plugin.config.node import CfgNode
from distinit_plugin.engine import optim
from distinit_plugin.engine.schedule import Schedule


def build_optimizer(cfg: CfgNode, trainable: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of everything that trains."""
    solver = cfg.SOLVER
    return optim.build_optimizer(
        trainable,
        solver.OPTIMIZING_METHOD,
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        dampening=solver.DAMPENING,
        nesterov=solver.NESTEROV,
        betas=tuple(solver.BETAS),
        weight_decay=solver.WEIGHT_DECAY,
        bn_weight_decay=cfg.BN.WEIGHT_DECAY,
        zero_wd_1d=solver.ZERO_WD_1D_PARAM,
    )


def build_schedule(cfg: CfgNode) -> Schedule:
    """The learning rate over time."""
    solver = cfg.SOLVER
    return Schedule(
        solver.LR_POLICY,
        base_lr=solver.BASE_LR,
        max_epoch=solver.MAX_EPOCH,
        unit=cfg.RUNNER.SCHEDULE_UNIT,
        steps=solver.STEPS,
        lrs=solver.LRS,
        cosine_end_lr=solver.COSINE_END_LR,
        warmup_epochs=solver.WARMUP_EPOCHS,
        warmup_start_lr=solver.WARMUP_START_LR,
        plateau_patience=cfg.RUNNER.PLATEAU_PATIENCE,
        plateau_factor=cfg.RUNNER.PLATEAU_FACTOR,
    )
