"""Signals, hooks of the base optimizer and errors that come while a SAM step runs: no user's code finds perturbed
weights, and nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_looksam.engines.signals import signals_wait

from .checkpoints import same_bits
from .inside import is_evaluating_again
from .ranks import run_on_ranks
from .training import Case, engine_for, master_weights, train, train_window, visible_weights

CASE = Case(world=2, model="straddling", two_groups=True, k=2, rho=0.5, updates=5, params={"torch_adam": True})
CPU = {"device": "cpu"}


def weights_on_this_rank(engine: Any) -> list[Tensor]:
    """What the model computes with, as far as this rank has it: nothing is sent."""
    found = []
    for p in engine.module.parameters():
        found += [p.detach().clone()] + ([p.ds_tensor.detach().clone()] if hasattr(p, "ds_tensor") else [])
    return found


# Signals --------------------------------------------------------------------------------------------------------------


def stop_when_told(engine: Any, folder: str, number: int, seen: list[Any]) -> Callable[..., None]:
    """What scripts do on the signal that announces the end of a job's time."""
    def handler(*_: Any) -> None:
        seen.append(weights_on_this_rank(engine))
        engine.module.stop = True
        engine.save_checkpoint(folder, tag=f"on-signal-{number}")

    return handler


def train_with_signals(case: Case, folder: str, interrupts: bool) -> None:
    """On a rank: in the second evaluation of the third SAM step comes SIGTERM, twice, and perhaps Ctrl-C."""
    with engine_for(case) as engine:
        engine.module.stop = False
        seen: list[Any] = []
        before = signal.signal(signal.SIGTERM, stop_when_told(engine, folder, signal.SIGTERM, seen))
        handler = signal.getsignal(signal.SIGTERM)

        def send(*_: Any) -> None:
            if is_evaluating_again(engine) and engine.global_steps == 2:
                for number in [signal.SIGTERM, signal.SIGTERM, *[signal.SIGINT] * interrupts]:
                    signal.raise_signal(number)

        engine.module.register_forward_hook(send)
        try:
            for update in range(3):
                clean, saved = weights_on_this_rank(engine), master_weights(engine)
                with pytest.raises(KeyboardInterrupt) if interrupts and update == 2 else nullcontext():
                    train_window(engine, case, update)
            assert signal.getsignal(signal.SIGTERM) is handler
        finally:
            signal.signal(signal.SIGTERM, before)
        assert engine.module.stop and engine.looksam.step_kind == "sam" and engine.global_steps == 3
        assert len(seen) == 1, "blocked signals are delivered once"
        if case.ascent != "micro_batch":  # whose second evaluations end in backward()
            clean, saved = weights_on_this_rank(engine), master_weights(engine)
        assert all(torch.equal(a, b) for a, b in zip(seen[0], clean, strict=True))
    with engine_for(case) as resumed:
        resumed.load_checkpoint(folder, tag=f"on-signal-{signal.SIGTERM}")
        same_bits(master_weights(resumed), saved)


@pytest.mark.parametrize(("stage", "ascent", "interrupts"), [
    (0, "global", False), (2, "global", True), (3, "global", False), (1, "rank", False), (2, "micro_batch", False)])
def test_a_signal_waits_for_the_end_of_a_sam_step(stage: int, ascent: str, interrupts: bool, tmp_path: Path) -> None:
    run_on_ranks(2, train_with_signals, replace(CASE, stage=stage, ascent=ascent), str(tmp_path), interrupts)


def run_in_asyncio(case: Case) -> None:
    """On a rank: asyncio hears of a signal from the interpreter, and its handler runs when the loop goes on."""
    import asyncio

    with engine_for(case) as engine:
        told: list[int] = []
        engine.module.register_forward_hook(
            lambda *_: signal.raise_signal(signal.SIGTERM) if is_evaluating_again(engine) else None)

        async def loop() -> None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.append, 1)
            train_window(engine, case, 0)
            await asyncio.sleep(0.1)

        asyncio.run(loop())
        assert told == [1]


def test_asyncio_is_told_once() -> None:
    run_on_ranks(1, run_in_asyncio, replace(CASE, world=1))


def interrupt_twice(case: Case) -> None:
    """On a rank: a second evaluation that does not end."""
    with engine_for(case) as engine:
        def hang(*_: Any) -> None:
            if is_evaluating_again(engine):
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                raise AssertionError("goes on")

        hook = engine.module.register_forward_hook(hang)
        with pytest.raises(KeyboardInterrupt):
            train_window(engine, case, 0)
        hook.remove()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_does_not_wait() -> None:
    run_on_ranks(1, interrupt_twice, replace(CASE, world=1))


# Hooks of the base optimizer ------------------------------------------------------------------------------------------


def train_with_hooks(case: Case) -> dict[str, Tensor]:
    """On a rank: rank 0 alone has an average of the weights, kept by a hook of the base optimizer's step."""
    with engine_for(case) as engine:
        seen: list[Any] = []

        def look(*_: Any) -> None:
            seen.append(weights_on_this_rank(engine))
            if case.stage < 3:
                engine.module.state_dict()

        if torch.distributed.get_rank() == 0:
            engine.basic_optimizer.register_step_pre_hook(look)
        before = weights_on_this_rank(engine)
        for update in range(case.updates):
            train_window(engine, case, update)
            after = weights_on_this_rank(engine)
            for found in seen:  # DeepSpeed steps one param group after the other
                for now, *others in zip(found, before, after, strict=True):
                    same = [now == weights for weights in others if weights.shape == now.shape]
                    assert now.numel() == 0 or torch.stack(same).any(0).all(), update  # 0: not gathered
            seen.clear()
            before = after
        return master_weights(engine)


@pytest.mark.parametrize(("stage", "options"), [
    (0, {}), (1, {}), (1, {"precision": "bf16", "config": {"data_types": {"grad_accum_dtype": "fp32"}}}),
    (2, {"zero": {"offload_optimizer": CPU}}), (2, {"ascent": "rank"}), (2, {"ascent": "micro_batch"}), (3, {}),
    (3, {"precision": "bf16"}), (3, {"zero": {"stage3_param_persistence_threshold": 0, "offload_optimizer": CPU}})])
def test_a_hook_of_the_base_optimizer_sees_no_perturbed_weights(stage: int, options: dict[str, Any]) -> None:
    case = replace(CASE, stage=stage, **options)
    expected = run_on_ranks(2, train, case)[0].weights
    for weights in run_on_ranks(2, train_with_hooks, case):
        same_bits(weights, expected)


# Updates that fail ----------------------------------------------------------------------------------------------------


def fail_in_update(case: Case, when: str, folder: str) -> None:
    """On a rank: the update of the second SAM step raises, before or after the weights have changed."""
    with engine_for(case) as engine:
        class Scheduler:
            def step(self, *_: Any, **__: Any) -> None:
                if engine.global_steps == 2 and when == "after":
                    raise ValueError("Tried to step 3 times. The total number of steps is 2")

            def state_dict(self) -> dict[str, Any]:
                return {}

        def out_of_memory(*_: Any) -> None:
            engine.basic_optimizer.step = step
            raise torch.OutOfMemoryError("exp_avg")

        engine.lr_scheduler, step = Scheduler(), engine.basic_optimizer.step
        for update in range(2):
            train_window(engine, case, update)
        before = master_weights(engine)
        if when == "before":
            engine.basic_optimizer.step = out_of_memory
        with pytest.raises(torch.OutOfMemoryError if when == "before" else ValueError):
            train_window(engine, case, 2)
        engine.save_checkpoint(folder)
        weights = master_weights(engine)
        if case.precision == "fp32":
            same_bits(visible_weights(engine), weights)
        if when == "before":
            same_bits(weights, before)
        else:
            assert any(not torch.equal(weights[name], before[name]) for name in weights)
        engine.module.state_dict()
        engine.lr_scheduler = None
        engine.zero_grad()
        train_window(engine, case, 2)
        assert engine.looksam.step_kind == "sam"
        after = master_weights(engine)
    if when == "before":
        with engine_for(case) as other:
            for update in range(3):
                train_window(other, case, update)
            same_bits(after, master_weights(other))


@pytest.mark.parametrize(("stage", "when", "options"), [
    (0, "before", {}), (0, "after", {}), (1, "before", {"ascent": "rank"}), (2, "before", {}),
    (2, "after", {"ascent": "micro_batch"}), (2, "before", {"precision": "bf16"}), (2, "after", {"precision": "bf16"}),
    (2, "before", {"zero": {"offload_optimizer": CPU}}), (3, "before", {}), (3, "after", {}),
    (3, "before", {"zero": {"offload_optimizer": CPU}})])
def test_an_update_that_raises_leaves_clean_weights(stage: int, when: str, options: dict[str, Any],
                                                    tmp_path: Path) -> None:
    run_on_ranks(2, fail_in_update, replace(CASE, stage=stage, **options), when, str(tmp_path))


def test_a_sam_step_may_run_outside_of_the_main_thread() -> None:
    """Where Python lets nobody touch signal handlers."""
    ran: list[bool] = []

    def step() -> None:
        with signals_wait():
            ran.append(True)

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert ran
