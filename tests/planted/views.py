"""Several views of an example: averaged, clipped once, counted once, and told apart by chance alone."""

from __future__ import annotations

from tests.planted.fault import Fault

VIEWS, DROPOUT = "tests/test_views.py", "tests/utils/training/test_views.py"
NEIGHBOUR = VIEWS + "::test_one_unit_moves_the_sum_by_at_most_c_whatever_the_number_of_views[4-examples]"

FAULTS = (
    Fault(
        "views: each is clipped by itself",
        "utils/training/micro_batches.py",
        "step.backward(weighted, rows_per_unit=part.rows_per_unit, items=part.numbers_of(items))",
        "step.backward(\n        weighted,\n        rows_per_unit=part.rows_per_unit // part.views,\n"
        "        items=np.repeat(part.numbers_of(items), part.views),\n    )",
        (NEIGHBOUR,),
        "an example of k views moves the sum by k C",
    ),
    Fault(
        "views: each counts as an item of its own",
        "dptune/units/batches.py",
        "return [Part(data, draw, data.lengths, views, views=views)]",
        "return [Part(data, np.repeat(draw, views), data.lengths)]",
        (NEIGHBOUR,),
        "an example of k views moves the sum by k C",
    ),
    Fault(
        "views: added instead of averaged",
        "dptune/units/batches.py",
        "np.full(len(counts), 1 / views)",
        "np.ones(len(counts))",
        (VIEWS + "::test_the_sum_is_the_oracles[LoRA-examples-1.0]",),
        "gradients are k times as long, so nearly all of them are clipped",
    ),
    Fault(
        "views: those of an author's rows count as rows of a mean",
        "dptune/units/batches.py",
        "counts[: len(items)] = [self.views * len(rows) for rows in chosen]",
        "counts[: len(items)] = [len(rows) for rows in chosen]",
        (VIEWS + "::test_the_sum_is_the_oracles[LoRA-authors, mean-1.0]",),
        "only some views of an author are trained on, in the places of others",
    ),
    Fault(
        "views: all rows lose the same tokens",
        "utils/training/views.py",
        "torch.rand(shape, device=device)",
        "torch.rand(shape[1:], device=device).expand(shape)",
        (DROPOUT + "::test_each_row_and_each_place_is_chosen_by_itself",),
        "views differ less than they should, and rows share their chance",
    ),
    Fault(
        "views: special tokens are replaced",
        "utils/training/views.py",
        "    replaceable[special[special < size]] = False\n",
        "",
        (DROPOUT + "::test_each_ordinary_token_is_replaced_with_the_probability_and_nothing_else_is",),
        "answers end in the middle, and padding turns into words",
    ),
    Fault(
        "views: token dropout in evaluation",
        "utils/training/views.py",
        "if self._model.training else input_ids",
        "if self._probability else input_ids",
        (DROPOUT + "::test_evaluation_sees_the_rows_as_they_are",),
        "held-out losses and the scores of an audit are those of damaged texts",
    ),
    Fault(
        "views: the report does not tell of them",
        "dptune/units/unit.py",
        "return self._how_it_is_sampled + views",
        "return self._how_it_is_sampled",
        ("tests/dptune/units/test_unit.py::test_views_are_part_of_the_method_and_of_the_identity",),
        "a reviewer does not learn what was clipped",
    ),
)
