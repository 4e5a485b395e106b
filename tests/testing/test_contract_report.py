"""Refusals, skips, reports and errors of the contract, and what a user may hand over."""

import pytest
import torch
from faulty_modules import Once
from good_modules import LAYER, SIGNAL, GoodLayer, GoodSignal
from good_runs import FIELD, GoodField
from good_steps import GoodOptimizer, GoodTransform

from pullback.core.kinds import Transform
from pullback.testing import (
    KINDS,
    Case,
    ContractError,
    check_component,
    checks_for,
    parametrize_with_checks,
    run_check,
)
from pullback.testing.contract import as_case

CHECKS = {check.id: check for kind in KINDS for check in checks_for(kind)}
CHEAP = {check.id: "not the point here" for check in checks_for("field") if check.id != "docstring"}


# --- refusals -------------------------------------------------------------------------------------------


def test_a_refusal_that_raises_clearly_is_reported_with_its_reason():
    outcome = run_check(CHECKS["double_backward"], as_case(SIGNAL, build=Once), refusal="not built")
    assert outcome.status == "refused"
    assert "not built" in outcome.message
    assert "once_differentiable" in outcome.message


def test_a_refusal_that_is_out_of_date_fails():
    outcome = run_check(CHECKS["double_backward"], SIGNAL, refusal="not built")
    assert outcome.status == "failed"
    assert "Take it out of refuses" in outcome.message


def test_a_refusal_in_silence_fails():
    case = as_case(SIGNAL, backward=lambda grad, x: (2 * grad,))
    outcome = run_check(CHECKS["double_backward"], case, refusal="not built")
    assert outcome.status == "failed"
    assert "not refused by an error" in outcome.message


def test_a_refusal_without_a_message_fails():
    class Mute(GoodSignal):
        """Refuses bfloat16 without a word."""

        def forward(self, x):
            if x.dtype == torch.bfloat16:
                raise RuntimeError("no")
            return super().forward(x)

    outcome = run_check(CHECKS["dtypes"], as_case(SIGNAL, build=Mute), refusal="float32 only")
    assert outcome.status == "failed"
    assert "without a clear message" in outcome.message


def test_a_refusal_that_cannot_be_tested_is_listed():
    outcome = run_check(CHECKS["rows_apart"], FIELD, refusal="couples the particles of a batch")
    assert (outcome.status, outcome.message) == ("refused", "couples the particles of a batch")


def test_some_parts_cannot_be_refused():
    outcome = run_check(CHECKS["inputs_left_alone"], FIELD, refusal="works in place")
    assert outcome.status == "failed"


def test_refusals_of_the_class_count():
    class Declared(Once):
        """Declares what it cannot do."""

        refuses = {"double_backward": "its backward is not differentiable"}  # noqa: RUF012

    report = check_component(as_case(SIGNAL, build=Declared), skip={"compiles": "slow here"})
    assert report.status("double_backward") == "refused"
    assert report.status("compiles") == "skipped"


@pytest.mark.parametrize("given", ["skip", "refuses"])
def test_an_unknown_check_is_refused(given):
    with pytest.raises(ValueError, match=f"{given} must name checks of kind 'field', got 'no_such_check'"):
        check_component(FIELD, **{given: {"no_such_check": "why not"}})


def test_an_unknown_refusal_fails_as_a_test_too():
    (row, *_) = parametrize_with_checks([as_case(FIELD, refuses={"no_such_check": "why not"})]).args[1]
    case, check = row.values
    with pytest.raises(ValueError, match="no_such_check"):
        check(case)


def test_a_reason_must_be_given():
    with pytest.raises(ValueError, match="must give a reason"):
        check_component(FIELD, skip={"docstring": " "})


# --- reports --------------------------------------------------------------------------------------------


def test_no_check_is_left_out_of_the_report():
    report = check_component(FIELD, skip={"docstring": "here"})
    assert [outcome.check for outcome in report.outcomes] == [check.id for check in checks_for("field")]
    assert sum(report.count(s) for s in ("passed", "refused", "not applicable", "skipped")) == len(
        report.outcomes
    )
    assert "docstring" in str(report)
    with pytest.raises(KeyError, match="no_such_check"):
        report.status("no_such_check")


def test_the_error_lists_every_broken_part():
    class Wild(GoodField):
        """Draws and edits."""

        def __call__(self, x):
            torch.rand(1)
            return super().__call__(x.clamp_(-1, 1)).double()

    with pytest.raises(ContractError) as caught:
        check_component(as_case(FIELD, build=Wild))
    for name in ("global_generators", "inputs_left_alone", "field_dtypes"):
        assert f"- {name}: " in str(caught.value)
        assert caught.value.report.status(name) == "failed"


def test_checks_leave_the_global_generators_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check_component(FIELD)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_check_states_its_rule():
    assert all(len(check.says) > 15 and check.says.endswith((".", ")")) for check in CHECKS.values())


# --- what a user hands over -----------------------------------------------------------------------------


def test_an_instance_a_class_and_a_factory_will_do():
    for component in (GoodField(), GoodField, lambda: GoodField()):
        assert check_component(component, kind="field", skip=CHEAP).status("docstring") == "passed"


def test_the_kind_is_the_components_own():
    assert as_case(GoodTransform(0.5)).kind == "transform"
    assert as_case(GoodLayer).kind == "layer"
    assert as_case(lambda: GoodLayer()).kind == "layer"
    assert as_case(GoodOptimizer).kind == "optimizer"


def test_an_instance_is_copied_for_every_check():
    transform = GoodTransform(0.5)
    assert as_case(transform).build() is not transform
    assert as_case(transform).build().strength == 0.5


def test_an_optimizer_is_rebuilt_with_its_settings():
    optimizer = GoodOptimizer([torch.nn.Parameter(torch.ones(2))], lr=0.25)
    made = as_case(optimizer).build([torch.nn.Parameter(torch.ones(3))])
    assert made.param_groups[0]["lr"] == 0.25


def test_a_foreign_module_can_be_checked():
    report = check_component(torch.nn.Tanh(), kind="layer", skip={"compiles": "slow here"})
    assert report.status("gradcheck") == "passed"


def test_without_a_kind_there_is_an_error():
    with pytest.raises(ValueError, match=r"kind must be one of .*, got None"):
        check_component(torch.nn.Tanh())
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'tool'"):
        check_component(torch.nn.Tanh(), kind="tool")


def test_a_case_is_checked_when_it_is_made():
    with pytest.raises(TypeError, match="build must be a class or function"):
        Case(name="x", kind="layer", build=torch.nn.Tanh())
    with pytest.raises(ValueError, match="kind must be one of"):
        Case(name="x", kind="tool", build=torch.nn.Tanh)
    with pytest.raises(ValueError, match="invariances must be"):
        Case(name="x", kind="aggregator", build=object, invariances=frozenset({"beauty"}))


@parametrize_with_checks([FIELD])
def test_checks_run_as_tests(case, check):
    check(case)


def test_checks_as_tests_fail_and_skip():
    rows = parametrize_with_checks([as_case(LAYER, shape=None, refuses={"scales": "overflows"})]).args[1]
    by_id = {row.id: row for row in rows}
    case, check = by_id["GoodLayer-output_shape"].values
    with pytest.raises(pytest.skip.Exception, match="declares no shape"):
        check(case)
    case, check = by_id["GoodLayer-scales"].values
    with pytest.raises(pytest.skip.Exception, match="overflows"):
        check(case)
    (row,) = [
        r
        for r in parametrize_with_checks([as_case(LAYER, shape=lambda shape: (9,))]).args[1]
        if "output_shape" in r.id
    ]
    with pytest.raises(ContractError, match="output_shape"):
        row.values[1](row.values[0])


def test_a_component_that_ends_the_process_breaks_its_contract():
    class Leaves(Transform):
        """Ends the process."""

        def pre_step_(self, batch):
            raise SystemExit(3)

    with pytest.raises(ContractError, match="raised SystemExit: 3"):
        check_component(Leaves)
