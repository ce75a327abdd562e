import itertools
import math
import pickle
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics import MetricCollection, SumMetric

from lightning_gradconf import GradientConfusion
from lightning_gradconf.statistics import gradient_statistics, statistic_names

NAMES = ("eta", "min_cosine", "mean_cosine")


def draw_gradients(n, p=6, seed=0):
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed))


def oracle(gradients):
    """Loops over pairs of vectors in float64."""
    vectors = [[float(x) for x in gradient] for gradient in gradients]

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    products = [dot(a, b) for a, b in itertools.combinations(vectors, 2)]
    cosines = [dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) for a, b in itertools.combinations(vectors, 2)]
    return {"eta": max(0.0, -min(products)), "min_cosine": min(cosines), "mean_cosine": sum(cosines) / len(cosines)}


def assert_equals_oracle(actual, gradients, *, rtol=1e-5, atol=1e-6):
    expected = oracle(gradients)
    assert tuple(actual) == NAMES
    for name in NAMES:
        assert actual[name].shape == ()
        assert actual[name].item() == pytest.approx(expected[name], rel=rtol, abs=atol), name


def test_pairs_across_updates_count():
    gradients = draw_gradients(7)
    metric = GradientConfusion(NAMES)
    for part in gradients.split([3, 1, 2, 1]):
        metric.update(part)
    assert_equals_oracle(metric.compute(), gradients)


def test_one_tensor_per_parameter():
    weight, bias, scale = torch.randn(4, 3, 2), torch.randn(4, 3), torch.randn(4)
    metric = GradientConfusion(NAMES)
    metric.update([weight, bias, scale])
    assert_equals_oracle(metric.compute(), torch.cat([weight.flatten(1), bias, scale[:, None]], dim=1))


def test_gradients_of_a_module_one_step_at_a_time():
    module = torch.nn.Linear(3, 2)
    metric, vectors = GradientConfusion(NAMES), []
    for _ in range(3):
        module.zero_grad(set_to_none=False)  # in place: what was given to the metric must not change
        module(torch.randn(4, 3)).square().sum().backward()
        metric.update([parameter.grad[None] for parameter in module.parameters()])
        vectors.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]).clone())
    assert_equals_oracle(metric.compute(), vectors)


def test_the_given_tensor_may_change_afterwards():
    gradients = draw_gradients(3)
    metric = GradientConfusion(NAMES)
    metric.update(given := gradients.clone())
    given.zero_()
    assert_equals_oracle(metric.compute(), gradients)


def test_names_and_unit_size():
    gradients = draw_gradients(5)
    assert tuple(GradientConfusion().names) == statistic_names("default")
    metric = GradientConfusion("all", unit_size=64)
    metric.update(gradients)
    expected = gradient_statistics(gradients @ gradients.T, "all", unit_size=64)
    torch.testing.assert_close(metric.compute(), expected)
    assert expected["noise_scale"] != gradient_statistics(gradients @ gradients.T, "all")["noise_scale"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype):
    gradients = (300 * draw_gradients(4)).to(dtype)  # products overflow float16
    metric = GradientConfusion(NAMES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update([gradients[:, :2], gradients[:, 2:]])
        values = metric.compute()
    assert all(value.dtype == torch.float32 for value in values.values())
    assert_equals_oracle(values, gradients)


def test_float64_is_kept():
    gradients = draw_gradients(4).double()
    metric = GradientConfusion(NAMES)
    metric.update(gradients)
    values = metric.compute()
    assert all(value.dtype == torch.float64 for value in values.values())
    assert_equals_oracle(values, gradients, rtol=1e-12, atol=0)


def test_the_state_has_no_graph():
    gradients = draw_gradients(3).requires_grad_()
    metric = GradientConfusion(NAMES)
    for values in (metric(2 * gradients), metric.compute()):
        assert not any(value.requires_grad for value in values.values())
    assert not any(rows.requires_grad for rows in metric.gradients)


def test_forward_returns_the_value_of_the_call_and_accumulates():
    first, second = draw_gradients(3, seed=1), draw_gradients(2, seed=2)
    metric = GradientConfusion(NAMES)
    assert_equals_oracle(metric(first), first)
    assert_equals_oracle(metric(second), second)
    assert_equals_oracle(metric.compute(), torch.cat([first, second]))


def test_forward_of_single_gradients():
    gradients = draw_gradients(4)
    metric = GradientConfusion(NAMES)
    for gradient in gradients:
        values = metric(gradient[None])
        assert tuple(values) == NAMES
        assert all(value.isnan() and value.shape == () for value in values.values())
    assert metric.update_count == 4
    assert_equals_oracle(metric.compute(), gradients)


@pytest.mark.parametrize("wrong", [torch.ones(2, 5), torch.ones(6), torch.ones(2, 6, dtype=torch.long)])
def test_a_refused_forward_leaves_the_state(wrong):
    gradients = draw_gradients(3)
    metric = GradientConfusion(NAMES)
    metric.update(gradients)
    with pytest.raises((ValueError, TypeError)):
        metric(wrong)
    assert_equals_oracle(metric.compute(), gradients)


def test_reset():
    metric = GradientConfusion(NAMES)
    metric.update(draw_gradients(3, p=4))
    metric.reset()
    metric.update(gradients := draw_gradients(3, p=9))
    assert_equals_oracle(metric.compute(), gradients)


def test_pickle_and_clone():
    gradients = draw_gradients(4)
    metric = GradientConfusion(NAMES)
    metric.update(gradients[:2])
    for copy in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        copy.update(gradients[2:])
        assert_equals_oracle(copy.compute(), gradients)
    assert_equals_oracle(metric.compute(), gradients[:2])


def test_in_a_collection():
    gradients = draw_gradients(5)
    collection = MetricCollection({"confusion": GradientConfusion(NAMES), "sum": SumMetric()}, prefix="train/")
    values = collection(gradients[:3])
    assert set(values) == {"train/sum", *(f"train/{name}" for name in NAMES)}
    collection.update(gradients[3:])
    values = collection.compute()
    assert_equals_oracle({name: values[f"train/{name}"] for name in NAMES}, gradients)
    torch.testing.assert_close(values["train/sum"], gradients.sum())
    collection.reset()
    assert not collection["confusion"].update_called


def test_two_in_a_collection():
    gradients = draw_gradients(5)
    collection = MetricCollection({"a": GradientConfusion(NAMES), "b": GradientConfusion(["eta", "coherence"])})
    for part in gradients.split(2):
        collection.update(part)
    values = collection.compute()
    assert_equals_oracle({name: values[f"a_{name}"] for name in NAMES}, gradients)
    torch.testing.assert_close(values["b_eta"], values["a_eta"])
    torch.testing.assert_close(values["b_coherence"], gradients.sum(0).square().sum() / gradients.square().sum())


@pytest.mark.parametrize("updates", [0, 1])
def test_fewer_than_two_gradients(updates):
    gradients = draw_gradients(3)
    metric = GradientConfusion(NAMES)
    for gradient in gradients[:updates]:
        metric.update(gradient[None])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics', of a compute before any update
        with pytest.raises(ValueError, match=f"there are {updates} of them: call update"):
            metric.compute()
    metric.update(gradients[updates:])
    assert_equals_oracle(metric.compute(), gradients)


@pytest.mark.parametrize(
    ("gradients", "error", "message"),
    [
        (torch.ones(6), ValueError, r"shape \(m, P\), but got \(6,\): pass gradient.reshape\(1, -1\)"),
        (torch.ones(2, 3, 4), ValueError, r"shape \(m, P\), but got \(2, 3, 4\)"),
        ([torch.ones(3, 2), torch.ones(4)], ValueError, r"got shapes \[\(3, 2\), \(4,\)\]: pass \[p.grad\[None\]"),
        ([torch.ones(())], ValueError, r"got shapes \[\(\)\]"),
        ([torch.ones(2, 3), None], TypeError, r"got \['torch.float32', 'NoneType'\]"),
        (torch.ones(2, 6, dtype=torch.long), TypeError, r"got \['torch.int64'\]"),
        ([], TypeError, r"got \[\]"),
        (torch.ones(2, 5), ValueError, r"5 entries, but those before had 6"),
    ],
)
def test_wrong_gradients(gradients, error, message):
    metric = GradientConfusion(NAMES)
    metric.update(draw_gradients(2, p=6))
    with pytest.raises(error, match=message):
        metric.update(gradients)


def test_wrong_arguments_are_refused_at_once():
    with pytest.raises(ValueError, match="no statistic"):
        GradientConfusion(["etta"])
    with pytest.raises(ValueError, match="no labels"):
        GradientConfusion(["within_class_cosine"])
    with pytest.raises(ValueError, match="at least one sample"):
        GradientConfusion(["noise_scale"], unit_size=0)
    with pytest.raises(ValueError, match="Unexpected keyword"):
        GradientConfusion(unit=1)


def test_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    metric = GradientConfusion(NAMES)
    steps = [metric(draw_gradients(3, seed=seed)) for seed in range(3)]
    figure, axes = metric.plot()
    assert axes.get_title().startswith("9 gradients")  # of all, though the last forward saw three
    assert axes.lines[-2].get_xdata()[0] == pytest.approx(metric.compute()["min_cosine"].item())
    assert figure.axes == [axes]
    assert not pyplot.get_fignums()

    _, axes = pyplot.subplots()
    assert metric.plot(ax=axes) == (None, axes)
    assert axes.get_title().startswith("9 gradients")
    pyplot.close(axes.figure)

    _, axes = pyplot.subplots()
    assert metric.plot(steps, ax=axes) == (None, axes)
    assert list(axes.lines[1].get_ydata()) == pytest.approx([step["min_cosine"].item() for step in steps])
    pyplot.close(axes.figure)


# Two processes


def _worker(rank, folder, counts):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    mine = draw_gradients(sum(counts)).split(counts)[rank]
    metric, results = GradientConfusion(NAMES), {}
    for gradient in mine:
        results["forward"] = metric(gradient[None])
    try:
        results["compute"] = metric.compute()
    except ValueError as error:
        results["error"] = str(error)
    # What was gathered must not stay: another gradient on each process, on top of its own.
    metric.update(draw_gradients(2, seed=9)[rank : rank + 1])
    results["again"] = metric.compute()
    on_step = GradientConfusion(NAMES, dist_sync_on_step=True)
    results["on_step"] = on_step(draw_gradients(2, seed=9)[rank : rank + 1])
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("counts", [[2, 2], [3, 1], [0, 2], [1, 0]])
def test_pairs_across_processes_count(tmp_path, counts):
    mp.spawn(_worker, args=(str(tmp_path), counts), nprocs=2)
    gradients, more = draw_gradients(sum(counts)), draw_gradients(2, seed=9)
    for rank in range(2):
        results = torch.load(tmp_path / str(rank))
        if sum(counts) < 2:
            assert "there are 1 of them" in results["error"]
        else:
            assert_equals_oracle(results["compute"], gradients)
        assert_equals_oracle(results["again"], torch.cat([gradients, more]))
        assert_equals_oracle(results["on_step"], more)
        if counts[rank]:
            assert all(value.isnan() for value in results["forward"].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    gradients = draw_gradients(5).cuda()
    metric = GradientConfusion(NAMES).cuda()
    metric.update(gradients)
    values = metric.compute()
    assert all(value.is_cuda for value in values.values())
    assert_equals_oracle(values, gradients, rtol=1e-4, atol=1e-4)
