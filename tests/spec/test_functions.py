"""Matching of the user's functions by argument name."""

from __future__ import annotations

import functools

import pytest

from tpuspec.errors import ConfigError, ConfigTypeError
from tpuspec.spec.functions import (
    argument_names,
    call_by_name,
    check_input_fn,
    check_model_fn,
    check_model_fn_call,
    describe,
)

AVAILABLE = {"features": "F", "labels": "L", "mode": "M", "params": "P"}


def plain(labels, features):
    return features, labels


def keyword_only(features, *, labels, mode="unset"):
    return features, labels, mode


class Model:
    """Functions that are bound to an object."""

    def model_fn(self, features, labels):
        return features, labels

    @classmethod
    def from_class(cls, features, labels):
        return features, labels

    @staticmethod
    def static(features, labels):
        return features, labels

    def __call__(self, features, labels):
        return features, labels


@pytest.mark.parametrize("fn", [
    pytest.param(plain, id="declared in another order"),
    pytest.param(Model().model_fn, id="bound method"),
    pytest.param(Model.from_class, id="class method"),
    pytest.param(Model.static, id="static method"),
    pytest.param(Model(), id="callable object"),
    pytest.param(lambda features, labels: (features, labels), id="lambda"),
    pytest.param(functools.partial(lambda features, labels, rate: (features, labels), rate=1), id="partial by keyword"),
    pytest.param(functools.partial(lambda rate, features, labels: (features, labels), 1), id="partial by position"),
    pytest.param(functools.partial(Model().model_fn), id="partial of a bound method"),
    pytest.param(functools.partial(functools.partial(lambda a, b, features, labels: (features, labels), 1), b=2),
                 id="partial of a partial"),
])
def test_each_kind_of_callable_gets_the_arguments_it_names(fn):
    assert call_by_name(fn, AVAILABLE) == ("F", "L")
    assert set(argument_names(fn)) == {"features", "labels"}


def test_keyword_only_arguments_are_matched_too():
    assert argument_names(keyword_only) == ("features", "labels", "mode")
    assert call_by_name(keyword_only, AVAILABLE) == ("F", "L", "M")


def test_what_is_not_available_keeps_its_default():
    assert call_by_name(keyword_only, {"features": 1, "labels": 2}) == (1, 2, "unset")


def test_an_argument_that_a_partial_bound_is_not_overwritten():
    fn = functools.partial(keyword_only, mode="mine")
    assert "mode" not in argument_names(fn)
    assert call_by_name(fn, AVAILABLE) == ("F", "L", "mine")


def test_arguments_after_one_that_a_partial_bound_by_keyword_are_still_matched():
    fn = functools.partial(lambda rate, features, labels: (rate, features, labels), rate=0.1)
    assert call_by_name(fn, AVAILABLE) == (0.1, "F", "L")


def test_catch_all_arguments_get_nothing():
    def greedy(features, *rest, **named):
        return features, rest, named

    assert argument_names(greedy) == ("features",)
    assert call_by_name(greedy, AVAILABLE) == ("F", (), {})


def test_only_named_arguments_are_passed():
    assert call_by_name(lambda mode: mode, AVAILABLE) == "M"


def test_a_decorated_function_is_matched_by_the_names_of_the_original():
    @functools.wraps(plain)
    def wrapper(*args, **kwargs):
        return plain(*args, **kwargs)

    assert call_by_name(wrapper, AVAILABLE) == ("F", "L")


@pytest.mark.parametrize("value", [None, 3, "model_fn"])
def test_what_is_not_callable_has_no_argument_names(value):
    with pytest.raises(ConfigTypeError, match="expected a function; got"):
        argument_names(value)


def test_a_builtin_without_a_signature_is_refused_by_name():
    with pytest.raises(ConfigTypeError, match="cannot read the arguments of dict"):
        argument_names(dict)


@pytest.mark.parametrize(("fn", "name"), [
    (plain, "plain"), (Model().model_fn, "Model.model_fn"), (Model(), "Model"),
    (functools.partial(functools.partial(plain), features=1), "partial of plain"),
    (functools.partial(Model()), "partial of Model")])
def test_messages_name_the_function(fn, name):
    assert describe(fn) == name


def full(features, labels, mode, params, config, model, optimizer, global_step):
    return None


def test_a_model_fn_may_take_every_known_argument_and_needs_only_features():
    check_model_fn(full, params_given=True)
    check_model_fn(lambda features: None, params_given=False)
    check_model_fn(functools.partial(lambda features, params, width: None, width=3), params_given=True)


@pytest.mark.parametrize(("wrong", "right"), [
    (lambda features, lables: None, "labels"),
    (lambda features, optimiser: None, "optimizer"),
    (lambda features, global_steps: None, "global_step"),
])
def test_an_unexpected_argument_of_model_fn_is_refused_with_the_nearest_name(wrong, right):
    with pytest.raises(ConfigError, match=rf"has following not expected args: \['\w+'\].*Did you mean '{right}'\?"):
        check_model_fn(wrong, params_given=False)


def test_an_unexpected_argument_that_is_near_to_nothing_is_refused_without_a_guess():
    with pytest.raises(ConfigError, match=r"not expected args: \['xyz'\]. It may take features, labels") as caught:
        check_model_fn(lambda features, xyz: None, params_given=False)
    assert "Did you mean" not in str(caught.value)


def test_every_unexpected_argument_is_listed():
    with pytest.raises(ConfigError, match=r"\['batch', 'step'\]"):
        check_model_fn(lambda batch, features, step: None, params_given=False)


def test_an_unexpected_argument_is_refused_though_it_has_a_default():
    # It would never be filled: a misspelt name would be ignored in silence.
    with pytest.raises(ConfigError, match=r"not expected args: \['optimiser'\]"):
        check_model_fn(lambda features, optimiser=None: None, params_given=False)


@pytest.mark.parametrize("fn", [lambda labels: None, lambda features, /: None, lambda **features: None],
                         ids=["absent", "positional only", "catch-all"])
def test_a_model_fn_without_a_features_argument_is_refused(fn):
    with pytest.raises(ConfigError, match="must include features argument"):
        check_model_fn(fn, params_given=False)


def test_params_that_model_fn_does_not_take_are_refused():
    with pytest.raises(ConfigError, match=r"model_fn \(plain\) does not include params argument, but params"):
        check_model_fn(plain, params_given=True)


def test_a_model_fn_that_is_no_function_is_a_type_error():
    with pytest.raises(ConfigTypeError, match="model_fn must be a function; got int"):
        check_model_fn(3, params_given=False)


def test_labels_that_model_fn_would_drop_are_refused_before_missing_params():
    with pytest.raises(ConfigError, match="does not take labels, but input_fn returns labels"):
        check_model_fn_call(lambda features: None, has_labels=True)
    with pytest.raises(ConfigError, match="does not include params argument, required by TPUEstimator"):
        check_model_fn_call(lambda features: None, has_labels=False)
    with pytest.raises(ConfigError, match="does not include params argument, required by TPUEstimator"):
        check_model_fn_call(plain, has_labels=True)


def test_a_model_fn_without_labels_may_run_on_features_alone():
    check_model_fn_call(lambda features, params: None, has_labels=False)
    check_model_fn_call(full, has_labels=True)


@pytest.mark.parametrize("fn", [lambda: None, lambda mode: None, lambda **params: None])
def test_an_input_fn_without_params_is_refused(fn):
    with pytest.raises(ConfigError, match=r'does not include params argument.*params\["batch_size"\]'):
        check_input_fn(fn)


def test_an_input_fn_may_take_every_known_argument_or_params_alone():
    check_input_fn(lambda params: None)
    check_input_fn(lambda input_context, config, mode, params: None)
    check_input_fn(functools.partial(lambda params, path: None, path="data"))


def test_an_unexpected_argument_of_input_fn_is_refused():
    with pytest.raises(ConfigError, match=r"input_fn .* has following not expected args: \['batch_size'\]"):
        check_input_fn(lambda params, batch_size: None)


def test_an_input_fn_that_is_no_function_is_a_type_error():
    with pytest.raises(ConfigTypeError, match="input_fn must be a function that returns the input; got list"):
        check_input_fn([1, 2])
