"""A callback of TRL that moves its reference model is refused before the first step, with what to use instead."""

import ast
import re
import subprocess
import sys

import pytest
from transformers import TrainerCallback
from trl import BEMACallback as BEMACallbackOfPolicy
from trl.experimental.bema_for_ref_model import BEMACallback, DPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback

from trl_refplug import ConfigurationError, plug

from .. import tiny
from .runs import KINDS, assert_same, build, finished, train


class Steps(TrainerCallback):
    def __init__(self):
        self.began = 0

    def on_step_begin(self, *args, **kwargs):
        self.began += 1


VALUES = {
    "update_freq": 2,
    "ema_power": 0.4,
    "bias_power": 0.3,
    "lag": 5,
    "update_after": 1,
    "multiplier": 0.5,
    "min_ema_multiplier": 0.1,
    "ref_model_update_freq": 3,
    "ref_model_update_after": 2,
}


def kwargs_in(error):
    return ast.literal_eval(re.search(r"ref_provider_kwargs=(\{.*\})\.", str(error.value))[1])


def test_the_options_in_the_message_do_the_same(tmp_path):
    path = tiny.saved(tmp_path)
    args = {"max_steps": 6}
    callback = BEMACallback(**VALUES, update_ref_model=True)
    trainer = build("dpo", tmp_path, path, cls=plug(DPOTrainer), args=args, callbacks=[callback])
    trainer.add_callback(steps := Steps())
    with pytest.raises(ConfigurationError, match=r"BEMACallback.*ref_provider='ema'") as error:
        trainer.train()
    assert steps.began == 0
    kwargs = kwargs_in(error)
    assert kwargs == {"average": "bema", **VALUES, "master_device": "cpu"}
    theirs = train(
        "dpo", tmp_path, path, cls=DPOTrainer, args=args, callbacks=[BEMACallback(**VALUES, update_ref_model=True)]
    )
    ours = train("dpo", tmp_path, path, args={**args, "ref_provider": "ema", "ref_provider_kwargs": kwargs})
    assert_same(ours, theirs)


@pytest.mark.parametrize("late", [False, True], ids=["constructed", "added"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_trainer(kind, late, tmp_path):
    class Own(BEMACallback):
        """A subclass of the user's is recognized, too."""

    callback = Own(update_ref_model=True, device="meta")
    trainer = build(kind, tmp_path, tiny.saved(tmp_path), callbacks=[] if late else [callback])
    if late:
        trainer.add_callback(callback)
    trainer.add_callback(steps := Steps())
    with pytest.raises(ConfigurationError, match=r"callback Own, .*'average': 'bema', 'update_freq': 400") as error:
        trainer.train()
    assert "master_device" not in kwargs_in(error)
    assert steps.began == 0
    trainer.remove_callback(Own)
    trainer.train()
    assert steps.began == 3


@pytest.mark.parametrize("provider", ["frozen", "ema", "cached"])
def test_every_provider(provider, tmp_path):
    trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args={"ref_provider": provider})
    trainer.add_callback(BEMACallback(update_ref_model=True))
    with pytest.raises(ConfigurationError, match="BEMACallback"):
        trainer.train()


@pytest.mark.parametrize("callback_class", [BEMACallback, BEMACallbackOfPolicy])
def test_an_average_that_leaves_the_reference_alone_is_welcome(callback_class, tmp_path):
    path = tiny.saved(tmp_path)
    plain = train("dpo", tmp_path / "plain", path)
    trainer = build("dpo", tmp_path, path, cls=plug(DPOTrainer), callbacks=[callback_class(update_freq=1)])
    trainer.train()
    assert_same(finished(trainer), plain)
    assert (tmp_path / "bema" / "model.safetensors").is_file()


class TestSyncRefModelCallback:
    def test_of_the_reference(self, tmp_path):
        args = {"ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2}
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args=args)
        trainer.add_callback(SyncRefModelCallback(trainer.ref_model, None))
        with pytest.raises(ConfigurationError, match="SyncRefModelCallback") as error:
            trainer.train()
        assert kwargs_in(error) == {"alpha": 0.3, "sync_steps": 2}

    def test_of_another_model(self, tmp_path):
        other = tiny.model(seed=1)
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args={"ref_model_sync_steps": 1})
        trainer.add_callback(SyncRefModelCallback(other, None))
        before = other.lm_head.weight.clone()
        trainer.train()
        assert not other.lm_head.weight.equal(before)


def test_the_module_of_the_callback_is_not_imported():
    code = (
        "import sys, trl_refplug.trainers.moving_callbacks as m; m.refuse_moving_callbacks([object()], None, None); "
        "sys.exit(any('bema_for_ref_model' in name for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
