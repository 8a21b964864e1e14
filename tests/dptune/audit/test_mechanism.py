"""The audit of the engine as it is contradicts nothing; with each planted fault it does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.audit_faults import FAULTS
from dptune import InvalidArgument, accounting
from dptune.audit.bounds import epsilon_of_mu
from dptune.audit.checks import Finding
from dptune.audit.games import Mechanism
from dptune.audit.mechanism import Plan, Result, audit_mechanism, implied_epsilon
from dptune.clipping import Clipper
from dptune.clipping_styles import PerLayer

DELTA = 1e-5


def small(*, q: float = 1.0, sigma: float = 1.0, confidence: float = 1 - 1e-4, steps: int = 30, **how) -> Result:
    mechanism = Mechanism(noise_multiplier=sigma, units=16, **how)
    plan = Plan(sampling_probability=q, delta=DELTA, steps=steps, composed=5, confidence=confidence)
    return audit_mechanism(mechanism, plan)


@pytest.mark.parametrize(
    "how",
    [
        {"q": 0.25, "ranks": 2},
        {"group_size": 2, "q": 0.5},
        {"trained": "whole", "clipping": PerLayer()},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "trained": "whole"},
    ],
    ids=lambda how: "-".join(how),
)
def test_the_engine_is_not_contradicted(how) -> None:
    result = small(sigma=0.5, confidence=1 - 1e-6, **how)
    assert (result.verdict, result.contradicted) == ("no contradiction", False)
    questions = [one.question for one in result.findings]
    assert len(set(questions)) == len(questions) > 10
    group_size = how.get("group_size", 1)
    assert 0.2 < result.mu < 2
    (sharp,) = [one for one in result.findings if one.question.endswith("all units, as a Gaussian")]
    assert sharp.stated == pytest.approx(epsilon_of_mu(2 * group_size, DELTA), rel=1e-6)
    assert 0.1 * sharp.stated < sharp.found < sharp.stated
    if "q" in how:
        (composed,) = [one for one in result.findings if one.question.startswith("5 steps")]
        assert composed.stated == accounting.epsilon(
            noise_multiplier=0.5, sampling_probability=how["q"], steps=5, delta=DELTA, group_size=group_size
        )


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    fault, ranks, of_draws = FAULTS[name]
    with fault():
        result = small(ranks=ranks, q=0.25, steps=60) if of_draws else small(ranks=ranks)
    assert result.contradicted
    assert result.verdict.startswith("CONTRADICTED: ")
    assert result.findings[0].contradicted, "what is contradicted comes first"


@pytest.mark.parametrize("trained", ["lora", "whole"])
def test_norms_that_bfloat16_rounds_to_half_are_found(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of mixed precision alone: nothing changes in float32."""
    exact = Clipper.factors

    def rounded(self: Clipper, squared_norms: dict[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
        halves = 4 if seen else 1
        return exact(self, {name: value / halves for name, value in squared_norms.items()}, clip_norm)

    seen: list[bool] = []
    autocast = torch.autocast.__enter__

    def entered(self: torch.autocast) -> object:
        seen.extend([True] if self._enabled and self.fast_dtype == torch.bfloat16 else [])
        return autocast(self)

    monkeypatch.setattr(Clipper, "factors", rounded)
    monkeypatch.setattr(torch.autocast, "__enter__", entered)
    assert not small(trained=trained, confidence=1 - 1e-6).contradicted
    assert small(trained=trained, dtype="bfloat16").contradicted


def test_a_dtype_that_is_not_audited_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="dtype='float16': is not audited"):
        small(dtype="float16")


def test_a_fault_in_noise_or_clipping_shows_in_epsilon_itself() -> None:
    with FAULTS["a quarter of the noise"][0]():
        worst = next(one for one in small().findings if one.measured.startswith("epsilon"))
    assert worst.contradicted
    assert worst.found > 1.5 * worst.stated


def test_the_verdict_names_a_bound_on_epsilon_if_one_is_contradicted() -> None:
    noise = Finding("noise somewhere", 0.5, 1.0, True, "standard deviation", 10)
    bound = Finding("one step", 9.0, 4.0, True, "epsilon, at least", 10)
    assert Result((noise, bound), 1.0, 10).verdict == "CONTRADICTED: epsilon, at least 9, stated 4 (one step)"
    assert Result((noise,), 1.0, 10).verdict.endswith("0.5, stated 1 (noise somewhere)")


def test_the_epsilon_of_a_whole_run_follows_from_mu() -> None:
    run = {"sampling_probability": 0.1, "steps": 50, "delta": DELTA}
    assert implied_epsilon(0.5, **run) == accounting.epsilon(noise_multiplier=2.0, **run)
    assert implied_epsilon(0.0, **run) is None


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("steps", 3, "at least 20"),
        ("composed", 100, "must be at most half of the 30 steps"),
        ("confidence", 1.0, "at least 0.5 and below 1"),
        ("sampling_probability", 0.0, "above 0"),
        ("delta", 1.0, "below 1"),
    ],
)
def test_plans_are_checked(name: str, value: float, told: str) -> None:
    good = {"sampling_probability": 0.1, "delta": DELTA, "steps": 30, "composed": 5}
    with pytest.raises(InvalidArgument, match=f"{name}=.*{told}"):
        Plan(**(good | {name: value}))
