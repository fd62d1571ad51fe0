"""What ``ds-looksam check`` says of a configuration is what deepspeed.initialize does with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ds_looksam.cli.check import check
from ds_looksam.config.deepspeed_keys import KEYS
from ds_looksam.errors import LookSAMConfigError

from .configurations import CONFIGURATIONS, FILLED, WORKS, merged
from .models import make_model
from .ranks import run_on_ranks
from .training import forget_process_wide_settings


def initialize(*configs: dict[str, Any]) -> list[str | None]:
    """The errors that deepspeed.initialize raises on this rank, if any."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    import ds_looksam  # noqa: F401

    get_accelerator().is_fp16_supported = lambda: True  # torch computes it on every CPU
    said: list[str | None] = []
    for config in configs:
        module = make_model("mlp")
        try:
            engine, optimizer, *_ = deepspeed.initialize(model=module, config=config,
                                                         model_parameters=module.parameters())
            said.append(None if optimizer is not None else "there is no optimizer")
            engine.destroy()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        finally:
            forget_process_wide_settings()
    return said


@pytest.fixture(scope="module")
def initialized() -> dict[str, str | None]:
    [said] = run_on_ranks(1, initialize, *(configuration.json for configuration in CONFIGURATIONS))
    by_name = {configuration.name: raised for configuration, raised in zip(CONFIGURATIONS, said, strict=True)}
    assert len(by_name) == len(CONFIGURATIONS) >= 60
    return by_name


def refusal(path: Path, config: dict[str, Any]) -> str | None:
    """What ``check`` says, if it refuses."""
    path.write_text(json.dumps(config))
    try:
        check(path)
    except LookSAMConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda configuration: configuration.name)
def test_check_and_initialize_agree(configuration: Any, initialized: dict[str, str | None], tmp_path: Path) -> None:
    said, raised = refusal(tmp_path / "config.json", configuration.json), initialized[configuration.name]
    assert (said is None, raised is None) == (configuration.accepted, ) * 2, (said, raised)
    assert [words for words in configuration.words if words not in str(said)] == [], said
    assert not configuration.raised or configuration.words[0] in str(raised), raised


def test_what_hugging_face_fills_in(tmp_path: Path) -> None:
    """``check`` takes it as it is, and deepspeed.initialize once Accelerate has filled it in."""
    from accelerate.utils import DeepSpeedPlugin

    for auto, values in FILLED:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(auto))
        assert set(check(path).placeholders) == values.keys()
        plugin = DeepSpeedPlugin(hf_ds_config=auto)
        plugin.deepspeed_config_process(must_match=False, **values)
        filled = plugin.deepspeed_config
        assert '"auto"' not in json.dumps(filled)
        filled["steps_per_print"] = 10  # Accelerate: infinity, which is no JSON
        assert refusal(path, filled) is None and run_on_ranks(1, initialize, filled) == [[None]]


class Recording(dict[str, Any]):
    """A dict that knows which keys it was asked for."""

    asked: ClassVar[set[str]] = set()

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self


def test_all_that_deepspeed_reads_is_known() -> None:
    """Of the top level; a key that is missing in our list would be refused if it looked like another."""
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

    Recording.asked.clear()
    DeepSpeedConfig(Recording(merged(WORKS, {"train_batch_size": 8})))
    assert len(Recording.asked) > 40
    assert Recording.asked - _REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() - KEYS[""] == set()
