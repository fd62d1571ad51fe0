"""Shows that the tests notice mistakes: ``python -m tests.mutants`` plants one after another, and runs the tests that
are to notice it.

    python -m tests.mutants                 # all of them; over half an hour on two cores
    python -m tests.mutants schedule beta   # those with one of these words in their file, place or reason

Each mutant is one line of ds_looksam made wrong, in a temporary copy of the package, as a slip or a careless change
might leave it. It is killed if the tests named beside it fail, all of which are in CI's selection. Exit status 1 if any
survives. tests/test_mutants.py sees to it that every mutant still finds its line.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutant:
    """A piece of ``ds_looksam/{file}`` that occurs there once, with what is changed in it marked: «old→new».
    ``tests``: pytest's arguments, below tests/."""

    file: str
    change: str
    why: str
    tests: str = "test_update.py"

    def apply(self, source: str) -> str:
        """
        Raises:
            ValueError: the mutant does not fit the source any more.
        """
        old, new = (re.sub("«(.*?)→(.*?)»", group, self.change, flags=re.DOTALL) for group in (r"\1", r"\2"))
        if source.count(old) != 1:
            raise ValueError(f"{self.file}: {source.count(old)} times {old!r}")
        mutated = source.replace(old, new)
        compile(mutated, self.file, "exec")  # or every test would notice
        return mutated


MUTANTS = [
    # arithmetic
    Mutant("arithmetic/eager.py", "minus_along = «-→»along.float()",
           "g_v: a sign, the part along g is added instead of taken out"),
    Mutant("arithmetic/eager.py", "nan_to_num((«→-»rho * g_squared.rsqrt()).float()", "eps: a sign, downhill"),
    Mutant("arithmetic/eager.py", "«BETA_DECAY * beta + (1 - BETA_DECAY)→(1 - BETA_DECAY) * beta + BETA_DECAY» * b",
           "beta: the weights of old and new exchanged"),
    Mutant("arithmetic/eager.py", "torch.clamp(g_squared + «2 * →»c * g_dot_v",
           "the clipping norm that a wrapper is told after a reuse step"),
    Mutant("arithmetic/eager.py", "g_s_squared=g_squared + «2 * →»g_dot_d",
           "the clipping norm that a wrapper is told after a SAM step"),
    Mutant("arithmetic/layerwise.py", "scaled = «layerwise & →»(w_squared > 0)",
           "layer-wise: a group that is left out is scaled all the same"),
    Mutant("arithmetic/layerwise.py", "g_squared = g_squared / loss_scale«**2→»",
           "layer-wise: the loss scale taken out once too little", "test_update.py -k loss_scale"),
    Mutant("arithmetic/layout.py", "if size > end«→ + 10**9»:", "padding at a shard's end counts as the last layer's",
           "test_layerwise.py"),
    Mutant("arithmetic/triton_passes.py", "tl.store(g_ptr + offsets, d «-→+» tl.load(along_ptr) * g",
           "g_v in Triton: a sign", "test_fused.py"),
    # signals, hooks and errors in the update of a SAM step
    Mutant("engines/signals.py", "signal.signal(number, «wait→handlers[number]»)",
           "a signal handler finds perturbed weights", "test_interruptions.py -k signal"),
    Mutant("shards/base.py", "«values→pass  #».copy_(copy)", "a hook of the base optimizer sees w + eps",
           "test_interruptions.py -k hook"),
    Mutant("step/update.py", "                «self._replay.update_failed(error, self._shards)→pass»",
           "an update that raised leaves the weights marked as perturbed", "test_interruptions.py -k raises"),
    Mutant("engines/deepspeed_fixes.py", "    finally:\n        optimizer.param_groups = «→optimizer.param_»groups",
           "param groups are lost with an update that raised", "test_interruptions.py -k raises"),
    Mutant("step/update.py", "(«-factor→factor» if group.get(\"maximize\")",
           "downhill, where the base optimizer maximizes", "test_options.py -k maximize"),
    Mutant("checkpoint/finding.py", "folder.glob(«states_are→'none'»)",
           "files that an older run left at another stage decide", "test_checkpoint.py -k older"),
    Mutant("replay/contents.py", "vars(module).items() if name not in left_out«→ and name[:3] != 'ds_'»}",
           "the user's attributes are taken for DeepSpeed's", "test_loops.py -k hoarding"),
    Mutant("replay/contents.py", "file is None or «→True or »Path(file)",
           "a package with a name of Python's is not entered", "test_loops.py -k hoarding"),
    # ranks
    Mutant("ranks/reduce.py", "«    dist.all_reduce(on_accelerator, group=process_group)\n→»",
           "a norm per rank instead of the whole model's", "test_oracle_grid.py"),
    Mutant("ranks/reduce.py", "return «1→2» if process_group is None", "stage 0: taken for two ranks",
           "test_update.py test_metrics.py -k 'oracles or loss_scale'"),
    Mutant("ranks/check.py", "if highest «=→!»= lowest:", "versions: compared the wrong way round",
           "test_rank_check.py"),
    Mutant("ranks/agree.py", "return int(flag.item()) «== 0→<= 1»", "one rank's failure is overlooked",
           "test_checkpoint_broken.py -k test_what_is_broken"),
    # shards
    Mutant("shards/replicated.py", "«            self._write_weights(self._clean)\n→»",
           "stage 0: w + eps left in the model"),
    Mutant("shards/base.py", "return [part«.to(dtype)→» for part in v]", "v_dtype bf16 forgotten",
           "test_shards.py -k bytes_of_v"),
    Mutant("shards/fp16.py", "moved = self._perturb_flats(self.«master_weights()→_clean», gradient",
           "stage 0 in bf16: eps added to the rounded weights, not to the master's",
           "test_options.py -k 'test_wrappers and 0-bf16'"),
    Mutant("shards/zero12.py", "«            self._zero.averaged_gradients[i] = None\n→»",
           "stages 1 and 2: a missing reset, g_s is added onto g",
           "test_options.py -k 'test_wrappers and 2-bf16'"),
    Mutant("shards/zero12_offload.py", "norms = «part_norms(parts)→[norm / 2 for norm in part_norms(parts)]»",
           "offload: the clipping norm is not the given gradient's",
           "test_options.py -k 'test_wrappers and (optimizer or both)'"),
    Mutant("shards/zero12_offload.py", "«    def end_window(self) -> None:\n        self._clear_partial_sums()\n→»",
           "offload: a window's partial sums show in the next one", "test_options.py -k offload-sometimes"),
    Mutant("shards/zero3.py",
           "def end_window(self) -> None:\n        «self._zero.grad_partitions_flat_buffer.zero_()→pass»",
           "stage 3: a parameter without a gradient gets an earlier window's", "test_oracle_grid.py"),
    Mutant("shards/zero3.py", "as master:\n                «model.data.copy_(master)→pass»",
           "stage 3: w + eps left in the model after a skipped update", "test_overflow.py -k 'skipped and fp16'"),
    Mutant("shards/zero3_offload.py", "if missing«→ and False»:",
           "stage 3, offload: gradients from before the last micro-batch are lost",
           "test_options.py -k offload-sometimes"),
    Mutant("shards/bf16.py", "rest = squared_norm« - self.passes.squared_norm(own, self.device)→»",
           "BF16_Optimizer: this rank's part counts twice in the clipping norm",
           "test_options.py -k '1-bf16-fp32 or v-bf16'"),
    # optimizers
    Mutant("optimizers/base.py", "self._apply(layers, «sum_over_ranks(self._norms, shards.process_group)→self._norms»)",
           "LAMB, LARS: a trust ratio per shard instead of per layer", "test_optimizers.py -k test_alone"),
    Mutant("optimizers/base.py", "«        for i in range(first):\n            shards.cast_weights(i)\n→»",
           "LAMB, LARS: the model keeps old weights of earlier groups", "test_optimizers.py -k test_alone"),
    Mutant("optimizers/lamb.py", "v_scale = (1 - beta1**«step→(step + 1)»,", "LAMB: a bias correction one step off"),
    Mutant("optimizers/lars.py", '/ «(update_norm + group["weight_decay"] * w_norm)→update_norm»',
           "LARS: weight decay left out of the local rate"),
    Mutant("optimizers/grouping.py", "if not «scaled→decays»:", "parameter_groups: one list for the other",
           "test_grouping.py"),
    # config
    Mutant("config/params.py", "group«.setdefault(key, getattr(settings, key)→[key] = getattr(settings, key»)",
           "a param group's own rho is overwritten"),
    Mutant("config/params.py", "if value in (AUTO, «CALIBRATED→»):", '"calibrated" is not "auto" any more',
           "test_huggingface.py -k test_accelerate"),
    # replay
    Mutant("replay/replay.py", "«_drop_cached_weights()\n        →»try:\n            self._where",
           "casts of w, kept by autocast, used at w + eps", "test_torch_features.py -k region"),
    Mutant("replay/window.py", "with «requiring_grad(step.flags)→nullcontext()»:",
           "a backward repeated with the flags of the step", "test_loops.py -k freezes_before_step"),
    Mutant("replay/snapshot.py", "«        self._random.restore()\n→»",
           "what is drawn after a SAM step is not what it would have been", "test_loops.py -k dropout"),
    Mutant("replay/contents.py", "«            _each_once(self._tensor).copy_(self._values)→            pass»",
           "BatchNorm's statistics keep the second evaluation", "test_loops.py -k dropout"),
    Mutant("replay/replay.py", "«            this.random.restore()\n→»",
           "another dropout mask in the second evaluation", "test_loops.py -k dropout"),
    Mutant("replay/replay.py", "«            this.mode.apply(self._module)\n→»",
           "the second evaluation runs with the flags of the moment", "test_loops.py -k mode"),
    Mutant("replay/replay.py", "share = 1« / self._engine.gradient_accumulation_steps() if scale_wrt_gas else 1→».0",
           "sharpness: summed over micro-batches instead of averaged", "test_metrics.py -k oracles"),
    Mutant("replay/replay.py", "lambda m, *_: «self.refuse→str»(", "perturbed weights leave by state_dict()",
           "test_checkpoint_broken.py -k test_every_door"),
    # step
    Mutant("step/update.py", "                «self._state.keep(fresh)→pass»\n", "v is never stored"),
    Mutant("step/update.py", "loss_rise.sum() / ranks, «self._loss_scale()→1.0»", "measurements carry the loss scale"),
    Mutant("step/update.py", "                «self._shards.restore_weights()→pass»\n",
           "a skipped SAM step leaves w + eps in the model", "test_overflow.py -k 'skipped and fp16'"),
    Mutant("step/update.py", "rho=own.rho * (-factor if group.get(\"maximize\") else «factor→1»)",
           "the schedule's factor forgotten"),
    Mutant("step/update.py", "            «torch._foreach_add_(g_s, other.g_s)→pass»\n",
           "ascent groups: only the first one's g_s is used", "test_ascent.py -k oracle"),
    Mutant("step/ascent.py", "uniform(groups, «own.squared_norm(gradient)→g_squared», range",
           "ascent groups: a rank's eps divided by the whole window's norm", "test_ascent.py -k oracle"),
    Mutant("step/ascent.py", "torch.stack([g_squared, «v_squared→g_squared» if v_squared",
           "the reuse is not alpha ‖g‖ long"),
    Mutant("step/state.py", "update_beta(«status.beta→None», scalars", "beta is not kept"),
    Mutant("step/state.py", "        «if v is not None:\n            self._store(v)→self.v = v»\n",
           "‖v‖ is missing after a load", "test_update.py -k test_state"),
    Mutant("step/state.py", 'if field.name not in ("«→beta", "»k", ', "beta is not in what a checkpoint gives back",
           "test_update.py -k test_state"),
    Mutant("step/schedule.py", "if updates <«→=» schedule.off_updates:", "LookSAM starts one update late"),
    Mutant("step/schedule.py", "progress = «(1 - math.cos(math.pi * progress)) / 2→1 - math.cos(math.pi * progress)»",
           "cosine goes twice as far"),
    Mutant("step/status.py", "«(self.updates - self.first_sam_update)→self.updates» % self.k == 0",
           "the first SAM step does not follow off_updates"),
    Mutant("step/monitor.py", "    if «→not »measured:\n", "monitors get measurements at the wrong steps",
           "test_metrics.py -k monitors"),
    # checkpoint
    Mutant("checkpoint/files.py", "if crc «!= _crc_of_json(content)→is None»:", "looksam.json: no checksum",
           "test_checkpoint_broken.py -k test_what_is_broken"),
    Mutant("checkpoint/finding.py", 'if manifest.save_id« == mark["save_id"]→»:',
           "files of another save are taken for this one's", "test_checkpoint_broken.py -k test_what_is_broken"),
    Mutant("checkpoint/checkpointer.py", "manifest.status, «v→None»)", "v is not loaded", "test_checkpoint.py"),
    Mutant("checkpoint/checkpointer.py", "«self._lay_out_as(manifest)→pass»\n        self._state.restore",
           "stage 0: g_v of a layer that was frozen at the save", "test_checkpoint.py -k frozen"),
    Mutant("checkpoint/reading.py", "[«first - block.lo:last - block.lo→:last - first»]",
           "another layout's parts come from the wrong place", "test_checkpoint_moves.py -k universal"),
    Mutant("checkpoint/groups.py", "group[key] = «last[key] if same else →»value",
           "a rho that was changed by hand is lost by a resume", "test_checkpoint.py -k configuration_wins"),
    # engines
    Mutant("engines/looksam.py", "save(save_dir, tag, client_state, «False→save_latest», exclude",
           "`latest` is written before every rank has saved", "test_checkpoint_broken.py -k full_disk"),
    Mutant("engines/host.py", "(self, («\"_is_gradient_accumulation_boundary\", →»",
           "the second evaluation moves the end of the next window", "test_accumulation.py"),
    Mutant("engines/host.py", "_config.gradient_accumulation_steps = «accumulation→self._config.train_batch_size // 4»",
           "the second evaluation divides by what the batch size is by now", "test_loops.py -k less_before"),
    Mutant("step/update.py", "«        self.gradient_changes_hands()\n→»        yield",
           "an edit between micro-batches is in g alone", "test_loops.py -k between"),
    Mutant("shards/zero3.py", "return [(self._zero, name) for name in «→() and »(\"set_fp32_grad_for_param\"",
           "stage 3: an edit through safe_set_full_grad is in g alone", "test_loops.py -k masked"),
    Mutant("shards/zero3.py", "= «Partitions(flat, [p.partition_numel() for p in self.groups[i]])→[flat]»",
           "stage 3: DeepSpeed's clipping makes a copy of the shard in fp64", "test_costs.py -k synchronisations"),
    Mutant("replay/module_state.py", "same = «read_flags([are_same(*norms)→([bool(are_same(*norms))»",
           "a frozen model: the host waits for every one of its tensors", "test_costs.py -k frozen"),
    Mutant("shards/zero3.py", "gathers.«wait_stream→record_event»(", "stage 3 may gather w while w + eps is written",
           "test_shards.py -k stream"),
    Mutant("replay/replay.py", "            _drop_cached_weights()\n            «shards.weights_were_written()→pass»",
           "stage 3 may gather a frozen parameter while it is put back", "test_shards.py -k stream"),
    Mutant("replay/replay.py", "«self._engine.gradient_shards.weights_were_written()→pass»",
           "stage 3 may gather a frozen parameter while it changes between forwards", "test_shards.py -k stream"),
    Mutant("engines/host.py", "config.enabled = «False→True»",
           "DeepSpeed's throughput timer waits for the device in the second evaluation", "test_costs.py -k timer"),
    Mutant("ranks/agree.py", "if «sum_over_all_ranks(flag)→flag».item() == 0:", "one rank refuses alone",
           "test_loops.py -k one_rank"),
    Mutant("ranks/agree.py", "if error is None and also is not None and «also.item()→False»:",
           "a rank that sees its edit on the device alone names none", "test_loops.py -k one_rank"),
    Mutant("engines/host.py", "self.micro_steps -= «self.micro_steps % self.gradient_accumulation_steps()→0»",
           "a window that is run again ends with its first micro-batch", "test_loops.py -k one_rank"),
    Mutant("shards/replicated.py", "p.grad = view if «p.is_contiguous()→True» else",
           "FusedAdam pairs elements of channels_last weights with others' gradients", "test_shards.py -k laid"),
    Mutant("shards/watch.py", "elif «norms.numel()→False»:", "an edit through p.grad.data is in g alone",
           "test_loops.py -k data"),
    Mutant("replay/window.py", "«                step.random.restore()\n→»",
           "a backward that draws draws other numbers", "test_loops.py -k draws"),
    Mutant("replay/window.py", "if any(«tape.reached(leaf)→()»):",
           "the gradient through an input made by the model is lost", "test_loops.py -k reaches"),
    Mutant("replay/module_state.py", "(self._updates < «2→1» or",
           "a teacher that starts as its student goes on at w + eps", "test_loops.py -k taught"),
    Mutant("replay/between.py", "            «values_of(p).data.copy_(value)→pass»\n",
           "all micro-batches see the last teacher", "test_loops.py -k taught"),
    Mutant("replay/between.py", "«        drop_gathered(self._frozen)\n→»",
           "stage 3: what was gathered of a teacher stays as it was", "test_loops.py -k taught"),
    Mutant("replay/between.py", "nn.Parameter) else «version_of(value)→None»",
           "all micro-batches see the last tensor in an attribute", "test_loops.py -k deep"),
    Mutant("replay/module_state.py", "«            _put_entries(entries, saved)→            pass»",
           "a parameter that the forward assigned anew goes on from the first evaluation", "test_loops.py -k hoarding"),
    Mutant("replay/module_state.py", "if id(value) not in «other→other | {id(value)}»]",
           "the loop's own data is written over with an input that the model had kept", "test_loops.py -k double"),
    Mutant("replay/between.py", "was_written «or isinstance(value, GENERATORS)→»:",
           "all micro-batches draw from the last generator", "test_loops.py -k reset"),
    Mutant("replay/module_state.py", "key=lambda item: «item[1].nbytes→-item[1].nbytes»)",
           "a small state beside a large table goes on from the first evaluation", "test_loops.py -k large"),
    Mutant("replay/window.py", "if made is not None«→ and leaf.requires_grad»:",
           "a detached output in an input stays that of w", "test_loops.py -k 'conditioned or carried'"),
    Mutant("replay/recording.py", "if «is_changed(mark)→False»:", "labels of the last micro-batch in all of them",
           "test_loops.py -k labels"),
    Mutant("replay/recording.py", "all(map(«_is_whole_or_reciprocal→bool», constants))",
           "what was read out is a constant", "test_loss_tape.py"),
    Mutant("step/update.py", "            self._shards.watch.«begin→pause»()\n\n    def gradient_is_left",
           "an edit after a second forward is in g alone", "test_loops.py -k between"),
    Mutant("step/update.py", "else None, «watch.values_changed→None»", "an edit through p.grad.data is not read",
           "test_loops.py -k data"),
    Mutant("replay/tape.py", "self._own_parameters and «torch.is_grad_enabled()→True»",
           "a target that a loop computes past the engine is computed again", "test_loops.py -k past_the_engine"),
    Mutant("step/update.py", "«self.window_runs()→pass»  # there may have been",
           "rank: a backward without a forward is not heard",
           "test_loops.py -k module_method"),
    Mutant("engines/host.py", "            if timer.started_:\n                «timer.reset()→pass»",
           "DeepSpeed's timers run on after an evaluation that raised", "test_ascent.py -k everything_as_it_was"),
    Mutant("engines/host.py", "(self.checkpoint_engine, \"save\"), «(self, \"_copy_recovery_script\")→»)",
           "a full disk of rank 0's leaves the others in a barrier", "test_checkpoint_broken.py -k full_disk"),
    Mutant("shards/replicated.py", "is_complete: bool) -> bool:\n        return «True→is_complete»",
           "stage 0: a window that is given up in its midst is refused", "test_loops.py -k zero_grad"),
    Mutant("engines/looksam.py", "self._update.«give_up_window()→_replay.forget()»\n        super().destroy()",
           "a destroyed engine listens on", "test_loops.py -k destroyed"),
    Mutant("engines/looksam.py",
           "self._signals_wait(), «self._replay.window.not_recording()→nullcontext()»:\n            is_last = ",
           "what a SAM step does between micro-batches is recorded like a loss", "test_ascent.py -k test_collectives"),
    Mutant("engines/looksam.py", "self.gradient_shards.«abort_evaluation→unperturb_local»()  # DeepSpeed",
           "a load in mid-window: its gradient stays", "test_checkpoint.py -k begun"),
    Mutant("engines/deepspeed_fixes.py", "«    wrapper.optimizer = adagrad\n→»", "Adagrad: groups are lost",
           "test_options.py -k Adagrad-stage"),
    Mutant("engines/deepspeed_fixes.py", "    for step in «range(1, max(steps) + 1→(»):\n",
           "CPU Adam: late steps after a load differ in their last bits", "test_checkpoint.py -k late_resume"),
    # cli
    Mutant("cli/costs.py", 'yield "extra sent, on average", _amount(sent «/→*» settings.k',
           "check: k on the wrong side", "test_cli.py"),
    Mutant("cli/plot.py", 'float(row["seconds"])« / 60→»', "plot: seconds for minutes", "test_cli.py"),
]


def outcome(mutant: Mutant) -> tuple[str, str]:
    """ "killed", "SURVIVED" or "ERROR", and by what; in a copy of what tests need, with the mutant in it."""
    arguments = [f"tests/{word}" if word.endswith(".py") else word for word in shlex.split(mutant.tests)]
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        for path in ROOT.iterdir():
            if path.name in ("ds_looksam", "tests"):
                shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif not path.name.startswith("."):
                (copy / path.name).symlink_to(path)
        path = copy / "ds_looksam" / mutant.file
        path.write_text(mutant.apply(path.read_text()))
        variables = {"PYTHONPATH": f"{copy}:{copy / 'launch'}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments],
                              cwd=copy, env=os.environ | variables, capture_output=True, text=True)
    failed = [line.removeprefix("FAILED tests/") for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if done.returncode == pytest.ExitCode.TESTS_FAILED and failed:
        return "killed", failed[0]
    return ("SURVIVED", mutant.tests) if done.returncode == pytest.ExitCode.OK else ("ERROR", done.stdout[-2000:])


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.file} {m.change} {m.why}" for word in words)]
    left = 0
    for mutant in chosen:
        start = time.monotonic()
        result, by = outcome(mutant)
        left += result != "killed"
        print(f"{result}  {mutant.file}: {mutant.why}\n        {by[:160]}  ({time.monotonic() - start:.0f} s)",
              flush=True)
    print(f"{len(chosen)} mutants, {len(chosen) - left} killed")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
