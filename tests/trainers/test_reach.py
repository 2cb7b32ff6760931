"""Which of TRL's trainers work: the page says it, for every trainer that TRL has."""

import importlib
import inspect
import pkgutil
from dataclasses import dataclass

import pytest
import trl.experimental
import trl.trainer
from transformers import Trainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from tests.docs.markdown import DOCS
from trl_refplug import ReferenceArguments, SeamError, plug
from trl_refplug.trainers import PatchPoint
from trl_refplug.trainers.reach import WHY_NOT

from .. import tiny
from .runs import assert_same, finished
from .test_online import Watched


def trainers():
    """Every trainer of TRL, by the name of the package that it is imported from."""
    found = {}
    for package, exported in ((trl.trainer, "trl"), (trl.experimental, None)):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            try:
                names = vars(importlib.import_module(module.name))
            except ImportError:  # an optional dependency of what is no trainer
                continue
            for name, value in names.items():
                own = inspect.isclass(value) and issubclass(value, Trainer) and value.__module__ == module.name
                if own and not name.startswith("_"):
                    place = exported or ".".join(module.name.split(".")[:3])
                    found[f"{place}.{name}"] = value
    return found


def rows():
    """The table of the page: a trainer, whether it works, and why."""
    lines = (DOCS / "trainers.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `trl.")]
    return {name.strip("`"): (works, why) for name, works, why in cells}


def test_the_page_lists_every_trainer():
    assert sorted(rows()) == sorted(trainers())


@pytest.mark.parametrize("name", sorted(rows()))
def test_it_works_as_the_page_says(name):
    works, why = rows()[name]
    trainer_class = trainers()[name]
    if works == "yes":
        assert PatchPoint.find_in(trainer_class)
        return
    with pytest.raises(SeamError) as caught:
        plug(trainer_class)
    message = str(caught.value)
    if works == "no reference":
        assert f"{trainer_class.__name__} does not load a reference" in message
        assert "ref_model" not in inspect.getsource(trainer_class)
    else:
        assert works == "no"
        assert f"{trainer_class.__name__} cannot take its reference from a provider" in message
        if not why.startswith("the old name"):
            assert why.replace("with its teacher's", "with those of its teacher") in message


def test_no_reason_is_left_over():
    assert set(WHY_NOT) <= {name.rsplit(".", 1)[1] for name in trainers()}


@pytest.mark.parametrize("overlap", [False, True])
def test_gmpo_equals_trl(overlap, tmp_path):
    @dataclass
    class Config(ReferenceArguments, GMPOConfig):
        pass

    def run(cls, **kwargs):
        values = {"output_dir": str(tmp_path), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
        values |= {"logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no"}
        values |= {"num_generations": 2, "max_completion_length": 8, "beta": 0.1, "steps_per_generation": 2}
        trainer = cls(
            tiny.saved(tmp_path),
            tiny.length_reward,
            Config(**values),
            train_dataset=tiny.prompt_data(),
            processing_class=tiny.tokenizer(),
            **kwargs,
        )
        trainer.train()
        return finished(trainer)

    ours = run(plug(GMPOTrainer), **({"reference": Watched()} if overlap else {}))
    assert_same(ours, run(GMPOTrainer))
    assert ours.trainer.ref_model.calls == 2
