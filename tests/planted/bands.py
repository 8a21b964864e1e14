"""Noise that is correlated over steps: its matrix, its draws, its launches and what they cost."""

from __future__ import annotations

from tests.planted.fault import Fault

RUNS, NOISE = "tests/test_noise_bands.py", "tests/dptune/test_correlated_noise.py"
SAMPLING, LEDGER = "tests/dptune/test_sampling.py", "tests/dptune/test_ledger.py"

FAULTS = (
    Fault(
        "noise bands: columns longer than 1",
        "dptune/bands.py",
        "return tuple((bands / np.linalg.norm(bands)).tolist())",
        "return tuple((bands / np.linalg.norm(bands) * 1.5).tolist())",
        ("tests/dptune/test_bands.py", NOISE),
        "a row moves what is released by more than the noise is made for",
        (
            "if not math.isclose(self.sensitivity, 1.0, rel_tol=_UNIT):",
            "if not math.isclose(self.sensitivity, 1.0, rel_tol=1.0):",
        ),
    ),
    Fault(
        "noise bands: nobody waits for a turn",
        "dptune/sampling.py",
        "own: np.ndarray = hits[self._groups[start + hits] == self._turn % self.noise_bands]",
        "own: np.ndarray = hits",
        (SAMPLING + "::test_each_example_is_in_one_group_and_groups_take_turns",),
        "a row is in steps whose noises take each other back, b times as often as epsilon counts",
    ),
    Fault(
        "noise bands: the same group every second step",
        "dptune/sampling.py",
        "self._turn % self.noise_bands]",
        "self._turn % 2]",
        (SAMPLING + "::test_each_example_is_in_one_group_and_groups_take_turns",),
        "with 4 bands or more, a row's turns are closer together than its noise allows",
    ),
    Fault(
        "noise bands: a forgotten draw's turn is skipped",
        "dptune/sampling.py",
        "        self._turn -= len(self._unused)\n",
        "",
        (SAMPLING + "::test_a_forgotten_draw_leaves_its_turn",),
        "groups come out of step with the noise, and a row may have one turn more than epsilon counts",
    ),
    Fault(
        "noise bands: two steps share a sampler",
        "dptune/sampling.py",
        "if self.noise_bands > 1 and (self._serves_a_step or self._turn):",
        "if self.noise_bands > 1 and self._serves_a_step and not self._turn:",
        (RUNS + "::test_a_sampler_serves_one_step_from_its_first_draw",),
        "each step's noise sees only some of the turns, closer together than it allows",
    ),
    Fault(
        "noise bands: a sampler without groups passes",
        "dptune/mechanism.py",
        "if sampler.noise_bands != self.noise_bands:",
        "if sampler.noise_bands > self.noise_bands:",
        (RUNS + "::test_a_sampler_serves_one_step_from_its_first_draw",),
        "rows are in steps next to each other, whose noises take each other back",
    ),
    Fault(
        "noise bands: turns are rounded down",
        "dptune/accounting/spend.py",
        "turns = -(-self.steps // bands)",
        "turns = self.steps // bands",
        (NOISE + "::test_what_it_releases_fits_the_stated_epsilon_and_no_cheaper_one", LEDGER),
        "the group that begins has a turn more than epsilon counts",
    ),
    Fault(
        "noise bands: turns counted with the probability of a step",
        "dptune/accounting/spend.py",
        "sampling_probability=bands * self.sampling_probability, steps=turns",
        "sampling_probability=self.sampling_probability, steps=turns",
        (NOISE + "::test_what_it_releases_fits_the_stated_epsilon_and_no_cheaper_one", LEDGER),
        "rows are drawn b times as often as epsilon counts",
    ),
    Fault(
        "noise bands: launches counted as one",
        "dptune/ledger.py",
        "settings = _Settings(noise_multiplier, sampling_probability, self.group_size, cut, noise_bands, block)",
        "settings = _Settings(noise_multiplier, sampling_probability, self.group_size, cut, noise_bands, 1)",
        (LEDGER + "::test_turns_are_counted_block_by_block_and_rounded_up",),
        "each launch deals new groups, so a row may have a turn more in each than epsilon counts",
        ("    return bands, block\n", "    return bands, 1\n"),
    ),
    Fault(
        "noise bands: steps after a crash continue its block",
        "dptune/ledger.py",
        "        self._blocks += 1\n        return self._blocks",
        "        self._blocks = 1\n        return self._blocks",
        (RUNS + "::test_two_steps_on_one_ledger_are_two_blocks", LEDGER),
        "each launch deals new groups, so a row may have a turn more in each than epsilon counts",
    ),
    Fault(
        "noise bands: a resumed run may take all planned steps",
        "dptune/run/plan.py",
        "if recorded + left.steps <= every.steps:",
        "if completed + config.noise_bands * recorded <= config.noise_bands * every.steps + plan.steps:",
        (RUNS + "::test_a_crashed_run_counts_its_turns_by_launch_and_never_exceeds_the_target",),
        "turns of several launches exceed the target epsilon",
    ),
    Fault(
        "noise bands: unused steps cost nothing",
        "dptune/ledger.py",
        "counts = self._counts + Counter({latest: steps} if latest is not None else {})",
        "counts = self._counts",
        (RUNS + "::test_unused_steps_count_as_the_rest_of_the_launch",),
        "an early end that depends on the data lowers epsilon",
    ),
    Fault(
        "noise bands: all parts of a step's noise are the same one's",
        "dptune/correlated_noise.py",
        "values.sub_(earlier[number], alpha=coefficient)",
        "values.sub_(earlier[0][: len(values)], alpha=coefficient)",
        (NOISE + "::test_it_is_the_inverse_matrix_times_independent_noise",),
        "values share noise, so that their differences have less of it",
    ),
    Fault(
        "noise bands: noise is kept as the caller leaves it",
        "dptune/correlated_noise.py",
        "latest.append(values.clone())",
        "latest.append(values)",
        (NOISE + "::test_it_is_the_inverse_matrix_times_independent_noise",),
        "the next step takes back what was never added, and its noise depends on the sum",
    ),
    Fault(
        "noise bands: earlier noise is taken back at its own clip norm",
        "dptune/correlated_noise.py",
        "        add_noise(self.parts(), sum_P, std, grid=grid)\n",
        "        for part in (one for kept in self._earlier for one in kept):\n"
        '            part.mul_(getattr(self, "_std", std) / std)\n'
        "        self._std = std\n        add_noise(self.parts(), sum_P, std, grid=grid)\n",
        (RUNS + "::test_noise_is_kept_in_units_of_the_clip_norm_where_that_changes",),
        "with adaptive clipping, sums over steps in units of C have other noise than epsilon is computed for",
    ),
    Fault(
        "noise bands: ranks share their earlier noise",
        "dptune/correlated_noise.py",
        "deque(maxlen=bands.count - 1)  #",
        "_KEPT.setdefault(bands, deque(maxlen=bands.count - 1))  #",
        (NOISE, RUNS),
        "a launch continues the noise of another, and ranks take back each other's",
        ("class CorrelatedNoise:\n", "_KEPT: dict[Bands, deque[list[Tensor]]] = {}\n\n\nclass CorrelatedNoise:\n"),
    ),
)
