"""`trl-refplug store verify` and `store export` with a training command."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from peft import LoraConfig

from tests import tiny
from tests.cli.processes import run_here
from tests.trainers.runs import DATA, build
from trl_refplug import ConfigurationError, MissingRowError, ReferenceMismatchError
from trl_refplug.cli import launched
from trl_refplug.cli.tasks import Export, Precompute, Verify
from trl_refplug.store import LogProbStore
from trl_refplug.trainers.reference_columns import reference_columns


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


def flags(tmp_path: Path, kind: str = "dpo", rows: int = 12) -> list[str]:
    data = tmp_path / f"{kind}-{rows}.jsonl"
    if not data.exists():
        DATA[kind](rows).to_json(data)
    return [
        *("--model_name_or_path", tiny.saved(tmp_path), "--dataset_name", str(data)),
        *("--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--use_cpu", "--bf16", "false"),
        *("--report_to", "none", "--disable_tqdm", "true"),
    ]


def fill(tmp_path: Path, kind: str = "dpo", rows: int = 12) -> str:
    store = str(tmp_path / "store")
    options = json.dumps({"path": store})
    launched.train(kind, [*flags(tmp_path, kind, rows), "--ref_provider_kwargs", options], Precompute())
    return store


def wrong_copy(store: str, path: Path) -> str:
    """Make a store that is intact but holds wrong values."""
    import pyarrow as pa

    with LogProbStore(path, mode="a") as wrong:
        for file in Path(store).glob("*.arrow"):
            table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
            wrong.put(table["key"].to_pylist(), [row.values.to_numpy() + 0.01 for row in table["log_probs"]])
    return str(path)


def test_as_commands(tmp_path: Path) -> None:
    store = fill(tmp_path)
    done = run_here("store", "verify", store, "--sample", "5", "--", "dpo", *flags(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "24 different rows" in done.stdout
    assert "5 rows scored again: per token they differ by " in done.stdout
    table = tmp_path / "table.parquet"
    done = run_here("store", "export", store, str(table), "--", "dpo", *flags(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"12 rows with ref_chosen_logps and ref_rejected_logps in {table}" in done.stdout
    assert not list((tmp_path / "out").glob("**/*.safetensors"))
    assert len(Dataset.from_parquet(str(table))) == 12
    done = run_here("store", "verify", wrong_copy(store, tmp_path / "wrong"), "--", "dpo", *flags(tmp_path))
    assert done.returncode == 1
    assert "24 rows of the store were scored again" in done.stderr


class TestVerify:
    def test_says_how_many(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        launched.train("dpo", flags(tmp_path), Verify(fill(tmp_path), sample=1000))
        assert "24 rows scored again" in capsys.readouterr().out

    def test_wrong_values(self, tmp_path: Path) -> None:
        wrong = wrong_copy(fill(tmp_path), tmp_path / "wrong")
        with pytest.raises(ReferenceMismatchError, match=r"3 rows of the store .* 0\.01"):
            launched.train("dpo", flags(tmp_path), Verify(wrong, sample=3))

    def test_nothing_to_score(self, tmp_path: Path) -> None:
        LogProbStore(tmp_path / "store", mode="a").close()
        with pytest.raises(MissingRowError, match="24 of the 24 rows"):
            launched.train("dpo", flags(tmp_path), Verify(str(tmp_path / "store"), sample=3))

    def test_takes_a_training_command(self, tmp_path: Path) -> None:
        done = run_here("store", "verify", fill(tmp_path), "--", "dop")
        assert done.returncode == 2
        assert "Did you mean 'dpo'" in done.stderr


class TestExport:
    @pytest.mark.parametrize("ld_alpha", [None, 0.5])
    def test_columns_of_trl(self, ld_alpha: float | None, tmp_path: Path) -> None:
        """The table is the same that TRL's own `precompute_ref_log_probs` makes."""
        output = tmp_path / "table"
        arguments = flags(tmp_path) if ld_alpha is None else [*flags(tmp_path), "--ld_alpha", str(ld_alpha)]
        launched.train("dpo", arguments, Export(fill(tmp_path), str(output), "train"))
        table = load_from_disk(str(output))
        args = {"precompute_ref_log_probs": True, "ld_alpha": ld_alpha}
        theirs = build("dpo", tmp_path, tiny.saved(tmp_path), ours=False, args=args).train_dataset
        assert table["prompt_ids"] == theirs["prompt_ids"]
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            np.testing.assert_allclose(table[name], theirs[name], atol=1e-4)
            assert np.std(table[name]) > 0.1

    def test_kto(self, tmp_path: Path) -> None:
        output = tmp_path / "table.jsonl"
        launched.train("kto", flags(tmp_path, "kto"), Export(fill(tmp_path, "kto"), str(output), "train"))
        table = Dataset.from_json(str(output))
        args = {"precompute_ref_log_probs": True, "per_device_train_batch_size": 8}
        theirs = build("kto", tmp_path, tiny.saved(tmp_path), ours=False, args=args).train_dataset
        for name in ("ref_logps", "ref_KL_logps"):
            np.testing.assert_allclose(table[name], theirs[name], atol=1e-4)

    def test_missing_rows(self, tmp_path: Path) -> None:
        store = fill(tmp_path, rows=8)
        with pytest.raises(MissingRowError, match="8 of the 24 rows"):
            launched.train("dpo", flags(tmp_path), Export(store, str(tmp_path / "table"), "train"))
        assert not (tmp_path / "table").exists()

    def test_evaluation_sets(self, tmp_path: Path) -> None:
        sets = {"one": DATA["dpo"](5), "two": DATA["dpo"](7)}
        args = {"ref_provider": "cached", "ref_provider_kwargs": {"path": str(tmp_path / "store")}}
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args=args, eval_dataset=sets, peft_config=lora)
        assert len(reference_columns(trainer, "two")) == 7
        for split in ("eval", "three"):
            with pytest.raises(ConfigurationError, match="split"):
                reference_columns(trainer, split)

    def test_a_trainer_of_trl(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"DPOTrainer.*RefPlugDPOTrainer"):
            reference_columns(build("dpo", tmp_path, tiny.saved(tmp_path), ours=False))

    def test_no_such_format(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"table\.arrows.*\.parquet"):
            Export("store", "table.arrows", "train")

    def test_no_store(self, tmp_path: Path) -> None:
        done = run_here("store", "export", str(tmp_path / "nowhere"), str(tmp_path / "table"), "--", "dpo")
        assert done.returncode == 2
        assert "there is no store" in done.stderr
