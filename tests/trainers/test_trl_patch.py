"""
`plug` works with TRL's trainers and others, however a provider is named, and with clear errors if it cannot work.
"""

import gc
import inspect
import weakref

import pytest
import torch
from trl import DPOTrainer, SFTTrainer

from trl_refplug import (
    Capabilities,
    ConfigurationError,
    InvalidLogProbsError,
    OptionsError,
    ReferenceIdentity,
    ReferenceProvider,
    SeamError,
    UnknownProviderError,
    UnsupportedInputError,
    plug,
)
from trl_refplug.plugins import plugin_manager
from trl_refplug.providers.frozen import FrozenProvider

from .. import tiny
from .runs import KINDS, ONLINE, assert_same, build, config, finished, train, trainer_class


class Uniform(ReferenceProvider):
    """Every token is equally likely."""

    capabilities = Capabilities(temperature=True)
    vocab_size = 400

    def identity(self):
        return ReferenceIdentity("uniform", "0")

    def log_probs(self, batch):
        return (batch.labels[:, 1:] != -100).float() * -6.0


class TestPlug:
    def test_names(self):
        assert trainer_class("dpo").__name__ == "RefPlugDPOTrainer"
        assert issubclass(trainer_class("dpo"), DPOTrainer)
        assert plug(trainer_class("dpo")) is trainer_class("dpo")

    def test_subclass_with_its_own_init(self, tmp_path):
        class Mine(DPOTrainer):
            def __init__(self, model, note, *args, **kwargs):
                super().__init__(model, *args, **kwargs)
                # With TRL's own trainer, the reference is in its place by now. So it must be with ours.
                self.seen = next(self.ref_model.parameters()).requires_grad
                self.note = note

            def compute_loss(self, *args, **kwargs):
                return super().compute_loss(*args, **kwargs) * 2

        def run(cls):
            trainer = cls(
                tiny.saved(tmp_path),
                "hello",
                None,
                config("dpo", tmp_path),
                train_dataset=tiny.preference_data(),
                processing_class=tiny.tokenizer(),
            )
            trainer.train()
            return finished(trainer)

        ours = run(plug(Mine))
        assert ours.trainer.note == "hello"
        assert ours.trainer.seen is False
        assert_same(ours, run(Mine))

    def test_subclass_that_replaces_everything(self, tmp_path):
        class NoSuper(DPOTrainer):
            def __init__(self, *args, **kwargs):
                pass

        with pytest.raises(SeamError, match="super"):
            plug(NoSuper)()

    def test_trainer_without_a_reference(self):
        with pytest.raises(SeamError, match="SFTTrainer does not load a reference"):
            plug(SFTTrainer)

    def test_another_trl(self, tmp_path, monkeypatch):
        """A release of TRL that loads its reference in another way is noticed when a trainer is constructed."""
        import trl.trainer.dpo_trainer as dpo

        original = dpo.DPOTrainer.__init__

        def loads_twice(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.ref_model = dpo.create_model_from_path(self.model.config._name_or_path)

        loads_twice.__wrapped__ = original
        monkeypatch.setattr(dpo.DPOTrainer, "__init__", loads_twice)
        with pytest.raises(SeamError, match=r"expected to load 1 .* loaded 2.*trl 1\.\d+.*supports trl>=1\.15"):
            build("dpo", tmp_path, tiny.saved(tmp_path))

    def test_a_call_without_labels(self, tmp_path):
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path))
        with pytest.raises(SeamError, match=r"fused_lm_head.*trl>=1\.15"):
            trainer.ref_model(input_ids=torch.ones(1, 3, dtype=torch.long))
        ids = torch.ones(1, 3, dtype=torch.long)
        with pytest.raises(SeamError, match="shift_labels"):
            trainer.ref_model(input_ids=ids, labels=ids, shift_labels=ids, fused_lm_head=True)

    def test_a_loss_that_never_asks(self, tmp_path):
        class Deaf(DPOTrainer):
            def _compute_loss(self, model, inputs, return_outputs):
                labels = inputs["input_ids"]
                return model(inputs["input_ids"], labels=labels, fused_lm_head=True).loss

        with pytest.raises(SeamError, match="never asked"):
            train("dpo", tmp_path, tiny.saved(tmp_path), cls=plug(Deaf))


class TestReferenceArgument:
    @pytest.mark.parametrize("kind", KINDS)
    def test_takes_a_provider(self, kind, tmp_path):
        run = train(kind, tmp_path, tiny.saved(tmp_path), reference=Uniform())
        key = "kl" if kind in ONLINE else "rewards/chosen"
        assert run.logs[0][key] != 0
        if kind == "dpo":
            chosen = run.trainer.state.log_history[0]
            assert chosen["rewards/chosen"] != pytest.approx(0.0, abs=1e-3)

    def test_takes_no_class_and_no_model(self, tmp_path):
        for wrong in (Uniform, tiny.model()):
            with pytest.raises(ConfigurationError, match="ReferenceProvider instance"):
                build("dpo", tmp_path, tiny.saved(tmp_path), reference=wrong)

    def test_takes_a_provider_once(self, tmp_path):
        """It would be closed with its first trainer, and would have the policy of the second one as its reference."""
        given = FrozenProvider(model=tiny.model(seed=7))

        def trainer():
            data = {"train_dataset": tiny.preference_data(), "processing_class": tiny.tokenizer()}
            return trainer_class("dpo")(tiny.model(), args=config("dpo", tmp_path), reference=given, **data)

        trainer()
        with pytest.raises(ConfigurationError, match="FrozenProvider that another trainer was given before"):
            trainer()

    def test_excludes_the_flag(self, tmp_path):
        with pytest.raises(ConfigurationError, match="Keep one"):
            build("dpo", tmp_path, tiny.saved(tmp_path), reference=Uniform(), args={"ref_provider": "frozen"})
        with pytest.raises(ConfigurationError, match="Keep one"):
            build("dpo", tmp_path, tiny.saved(tmp_path), reference=Uniform(), ref_model=tiny.model())

    def test_none_of_trls_references_exists_beside_it(self, tmp_path):
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), reference=Uniform())
        assert list(trainer.ref_model.parameters()) == []
        with pytest.raises(AttributeError, match="no in-process copy"):
            trainer.ref_model.get_parameter("lm_head.weight")


class TestMisuse:
    def test_unknown_provider_before_anything_is_loaded(self, tmp_path):
        with pytest.raises(UnknownProviderError, match="Did you mean 'frozen'"):
            build("dpo", tmp_path, str(tmp_path / "no-such-model"), args={"ref_provider": "frosen"})

    def test_pin_returns_what_trl_cannot_place(self, tmp_path):
        class Two(Uniform):
            def pin(self, context):
                return torch.nn.ModuleList([context.policy, context.policy])

        with pytest.raises(
            ConfigurationError, match=r"Two\.pin\(\) returned a ModuleList; expected None, or one model"
        ):
            build("dpo", tmp_path, tiny.saved(tmp_path), reference=Two())

        class Named(Uniform):
            def pin(self, context):
                return "the name of a model"

        with pytest.raises(ConfigurationError, match=r"Named\.pin\(\) returned a str"):
            build("dpo", tmp_path, tiny.saved(tmp_path), reference=Named())

    def test_unknown_option_before_anything_is_loaded(self, tmp_path):
        args = {"ref_provider": "frozen", "ref_provider_kwargs": {"modle": "x"}}
        with pytest.raises(OptionsError, match="Did you mean 'model'"):
            build("dpo", tmp_path, str(tmp_path / "no-such-model"), args=args)

    def test_option_without_model(self, tmp_path):
        args = {"ref_provider": "frozen", "ref_provider_kwargs": {"revision": "main"}}
        with pytest.raises(ConfigurationError, match="needs option 'model'"):
            build("dpo", tmp_path, str(tmp_path / "no-such-model"), args=args)

    def test_two_references(self, tmp_path):
        args = {"ref_provider": "adapter"}
        with pytest.raises(ConfigurationError, match="Remove one"):
            build("dpo", tmp_path, tiny.saved(tmp_path), args=args, ref_model=tiny.model())
        args = {"ref_provider": "frozen", "ref_provider_kwargs": {"model": "x"}}
        with pytest.raises(ConfigurationError, match="Keep one of the two"):
            build("dpo", tmp_path, tiny.saved(tmp_path), args=args, ref_model=tiny.model())

    def test_flags_that_contradict(self, tmp_path):
        path = str(tmp_path / "no-such-model")
        both = {"precompute_ref_log_probs": True, "sync_ref_model": True}
        with pytest.raises(ConfigurationError, match="cannot be precomputed"):
            build("dpo", tmp_path, path, args=both)
        with pytest.raises(ConfigurationError, match="asks for the 'ema' reference"):
            build("dpo", tmp_path, path, args={"sync_ref_model": True, "ref_provider": "frozen"})
        with pytest.raises(ConfigurationError, match="nothing to synchronize"):
            build("grpo", tmp_path, path, args={"sync_ref_model": True, "beta": 0.0})

    @pytest.mark.parametrize("kind", ONLINE)
    def test_temperature_a_provider_ignores(self, kind, tmp_path):
        class Ignorant(Uniform):
            capabilities = Capabilities()

        with pytest.raises(ConfigurationError, match=r"temperature=0\.7"):
            build(kind, tmp_path, str(tmp_path / "no-such-model"), reference=Ignorant())
        build(kind, tmp_path, tiny.saved(tmp_path), reference=Ignorant(), args={"temperature": 1.0})

    @pytest.mark.parametrize("kind", ONLINE)
    def test_beta_zero_builds_nothing(self, kind, tmp_path, caplog):
        trainer = build(kind, tmp_path, tiny.saved(tmp_path), args={"beta": 0.0})
        assert trainer.ref_model is None
        assert "ref_provider" not in caplog.text
        trainer = build(kind, tmp_path, tiny.saved(tmp_path), args={"beta": 0.0, "ref_provider": "frozen"})
        assert trainer.ref_model is None
        assert "beta=0.0" in caplog.text
        trainer.train()
        caplog.clear()
        build(kind, tmp_path, tiny.saved(tmp_path), args={"beta": 0.0}, ref_model=tiny.model())
        assert "`ref_model` is not used" in caplog.text


class TestAnswers:
    """A wrong answer stops the run before anything is trained on it."""

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (lambda b: b.labels.tolist(), "returned a list; expected a torch.Tensor"),
            (lambda b: torch.zeros(b.labels.shape), "expected torch.float32"),
            (lambda b: torch.zeros(b.labels[:, 1:].shape, dtype=torch.bfloat16), "bfloat16"),
            (lambda b: torch.full(b.labels[:, 1:].shape, float("nan")), "not finite"),
            (lambda b: torch.full(b.labels[:, 1:].shape, float("-inf")), "row 0, position 1"),
        ],
    )
    @pytest.mark.parametrize("kind", KINDS)
    def test_invalid(self, kind, answer, message, tmp_path):
        class Wrong(Uniform):
            def log_probs(self, batch):
                return answer(batch)

        trainer = build(kind, tmp_path, tiny.saved(tmp_path), reference=Wrong())
        with pytest.raises(InvalidLogProbsError, match=message):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_images_for_a_text_provider(self, tmp_path):
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), reference=Uniform())
        ids = torch.ones(2, 4, dtype=torch.long)
        with pytest.raises(UnsupportedInputError, match="pixel_values"):
            trainer.ref_model(input_ids=ids, labels=ids, fused_lm_head=True, pixel_values=torch.zeros(2, 3, 8, 8))


class TestAuto:
    def test_flags_are_as_they_were(self, tmp_path):
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args={"ref_provider": "frozen"})
        assert trainer.args.ref_provider == "frozen"
        assert trainer.args.sync_ref_model is False


def test_a_trainer_no_longer_used_is_freed(tmp_path):
    closed = []

    class Attached(Uniform):
        def setup(self, context):
            self.context = context

        def close(self):
            closed.append(self)

    trainer = build("dpo", tmp_path, tiny.saved(tmp_path), reference=Attached())
    policy = weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert closed
    assert policy() is None


class Inner(Uniform):
    """A provider that another one is made of. It is open from `pin` until `close`."""

    open = set()
    fails_in = ""

    def pin(self, context):
        Inner.open.add(self)
        self.fail("inner pin")

    def setup(self, context):
        self.fail("inner setup")

    def close(self):
        Inner.open.discard(self)
        self.fail("inner close")

    def fail(self, place):
        if place == Inner.fails_in:
            raise KeyboardInterrupt(place)


class Outer(Inner):
    def pin(self, context):
        Inner.open.add(self)
        self.inner = context.create("inner")
        self.fail("pin")

    def setup(self, context):
        self.fail("setup")

    def close(self):
        Inner.open.discard(self)
        self.fail("close")


class TestClosing:
    @pytest.fixture(autouse=True)
    def _registered(self, site, monkeypatch):
        source = """
            from trl_refplug import hookimpl

            @hookimpl
            def refplug_register_providers(register):
                register("inner", "tests.trainers.test_trl_patch:Inner")
        """
        site.install("inner", plugins={"inner": "inner_mod"}, modules={"inner_mod": source})
        plugin_manager.cache_clear()
        monkeypatch.setattr(Inner, "open", set())
        monkeypatch.setattr(Inner, "fails_in", "")
        yield
        plugin_manager.cache_clear()

    @pytest.mark.parametrize("place", ["inner pin", "pin", "inner setup", "setup"])
    @pytest.mark.parametrize("policy", ["path", "instance"])
    def test_what_was_opened_when_construction_fails(self, place, policy, tmp_path, monkeypatch):
        monkeypatch.setattr(Inner, "fails_in", place)
        model = tiny.saved(tmp_path) if policy == "path" else tiny.model()
        with pytest.raises(KeyboardInterrupt, match=place):
            build("dpo", tmp_path, model, reference=Outer())
        assert not Inner.open

    @pytest.mark.parametrize("place", ["inner close", "close"])
    def test_one_that_fails_leaves_no_other_open(self, place, tmp_path, monkeypatch):
        monkeypatch.setattr(Inner, "fails_in", place)
        trainer = build("dpo", tmp_path, tiny.saved(tmp_path), reference=Outer())
        assert len(Inner.open) == 2
        with pytest.raises(KeyboardInterrupt, match=place):
            trainer._refplug_session.close()
        assert not Inner.open


@pytest.mark.parametrize("provider", ["frozen", "ema"])
def test_a_copy_is_freed_before_the_trainer_is(provider, tmp_path):
    trainer = build("dpo", tmp_path, tiny.saved(tmp_path), args={"ref_provider": provider})
    trainer.train()
    reference = weakref.ref(trainer.ref_model.provider.module)
    trainer.ref_model.provider.close()
    gc.collect()
    assert reference() is None


def test_metrics_in_trls_logs(tmp_path):
    class Counting(Uniform):
        def counters(self):
            return {"answers": 7}

    trainer = build(
        "dpo", tmp_path, tiny.saved(tmp_path), reference=Counting(), args={"gradient_accumulation_steps": 2}
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3
    for entry in steps:
        assert entry["ref/time"] > 0
        assert 0 < entry["ref/time_share"] < 1
        assert entry["ref/answers"] == 7
    assert not any("ref/time" in entry for entry in trainer.state.log_history if "train_runtime" in entry)


def test_config_values_end_in_json(tmp_path):
    args = config("dpo", tmp_path, ref_provider="frozen", ref_provider_kwargs={"device": "cpu"})
    assert '"device": "cpu"' in args.to_json_string()
    assert args.to_sanitized_dict()["ref_provider"] == "frozen"


def test_the_signature_names_the_arguments_that_are_added():
    assert inspect.signature(trainer_class("dpo")).parameters["reference"].default is None
    assert {"reference", "ref_model", "reward_funcs"} <= inspect.signature(trainer_class("grpo")).parameters.keys()


def test_a_provider_that_returns_the_policy_is_refused(tmp_path):
    class Same(Uniform):
        def pin(self, context):
            return context.policy

    with pytest.raises(ConfigurationError, match=r"Same\.pin\(\) returned the policy itself"):
        build("dpo", tmp_path, tiny.model(), reference=Same())


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_as_its_own_reference_model_is_refused(kind, tmp_path):
    model = tiny.model()
    args = config(kind, tmp_path)
    with pytest.raises(ConfigurationError, match="the same object"):
        trainer_class(kind)(
            model=model, ref_model=model, args=args, **({"reward_funcs": tiny.length_reward} if kind in ONLINE else {})
        )
