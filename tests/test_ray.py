"""Ray: the actor class of `map_batches`, and a job whose actors die, on a local cluster of two actors."""

import json
import os
import signal
import socket
import threading
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import fastdistil
import fastdistil.cli
from fastdistil import DistilBertConfig, DistilBertTokenizer, Embedder
from fastdistil.jobs import ray as module
from fastdistil.jobs.index import Index
from fastdistil.jobs.run import Embedding, Job, Log, run_job

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(minilm, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = DistilBertConfig(
        vocab_size=30522, dim=32, n_heads=2, hidden_dim=64, n_layers=2, max_position_embeddings=128
    )
    fastdistil.DistilBertModel(config).save_pretrained(path)
    DistilBertTokenizer.from_pretrained(minilm).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    return [" ".join(rng.choice(words, n)) for n in rng.integers(1, 80, 1_500)]


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def test_map_batches(cluster, checkpoint, texts):
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_items([{"number": i, "text": text} for i, text in enumerate(texts[:300])])
    found = dataset.map_batches(
        module.EmbedBatches,
        fn_constructor_kwargs={"model": checkpoint, "device": "cpu"},
        compute=ray.data.ActorPoolStrategy(size=2),
        batch_size=64,
        num_cpus=1,
    ).take_all()
    expected = Embedder.from_pretrained(checkpoint, device="cpu").encode(texts[:300])
    assert sorted(row["number"] for row in found) == list(range(300))
    for row in found:
        assert row["text"] == texts[row["number"]] and row["embedding"].dtype == np.float32
        np.testing.assert_allclose(row["embedding"], expected[row["number"]], atol=1e-6)


def test_batches_are_not_written_to(checkpoint, texts):
    column = np.array(texts[:5], dtype=object)
    column.flags.writeable = False
    embed = module.EmbedBatches(checkpoint, device="cpu", threads=torch.get_num_threads())
    out = embed({"text": column})
    assert out["text"] is column and out["embedding"].shape == (5, 32)
    with pytest.raises(ValueError, match="the batch has no column 'text' among 'words'"):
        embed({"words": column})


@pytest.mark.parametrize("reached", [True, False])
def test_sigterm_stays_whose_it_was(reached, checkpoint, monkeypatch):
    """Ray takes it when it starts, also where it then finds no cluster; what was started for nothing ends."""

    def init(**options):
        signal.signal(signal.SIGTERM, lambda *_: None)
        if not reached:
            raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", ended := Mock())
    monkeypatch.setattr(ray, "cluster_resources", lambda: (_ for _ in ()).throw(ConnectionError("gone")))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(ConnectionError, match="gone" if reached else "nobody there"):
            module.RayEmbedding(Embedder.from_pretrained(checkpoint, device="cpu"), "npy")
        assert signal.getsignal(signal.SIGTERM) is before and ended.called == reached
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_cluster_where_nobody_listens(checkpoint, monkeypatch):
    """Ray goes on trying for minutes."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", Mock(side_effect=AssertionError("asked")))
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))  # and does not listen
        for address in (f"127.0.0.1:{own.getsockname()[1]}", f"ray://127.0.0.1:{own.getsockname()[1]}"):
            with pytest.raises(ConnectionError, match=f"there is no Ray cluster at {address}"):
                module.RayEmbedding(Embedder.from_pretrained(checkpoint, device="cpu"), "npy", address=address)
        with pytest.raises(ConnectionError, match=r"there is no Ray cluster at a\.\.b:1"):
            module.RayEmbedding(Embedder.from_pretrained(checkpoint, device="cpu"), "npy", address="a..b:1")
        own.listen()
        with pytest.raises(AssertionError, match="asked"):
            module.RayEmbedding(Embedder.from_pretrained(checkpoint, device="cpu"), "npy", address=address)


@pytest.mark.parametrize("address", [None, "local"])
def test_actors_that_a_cluster_cannot_hold_are_refused(address, checkpoint, monkeypatch):
    for name, stub in (("is_initialized", lambda: False), ("init", Mock()), ("shutdown", Mock())):
        monkeypatch.setattr(ray, name, stub)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(ValueError, match="6 actors take one each of a cluster's 2 CPUs; ask for fewer"):
        module.RayEmbedding(Embedder.from_pretrained(checkpoint, device="cpu"), "npy", actors=6, address=address)


@pytest.mark.parametrize(("asked", "made"), [("auto", torch.float16), ("float32", torch.float32)])
def test_actors_on_gpus_have_the_dtype_that_was_asked_for(asked, made, checkpoint, monkeypatch):
    seen = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    monkeypatch.setattr(ray, "put", lambda value: value)
    worker = Mock()
    worker.remote = lambda *given: seen.append(given)
    monkeypatch.setattr(ray, "remote", lambda **_: lambda cls: worker)
    embedder = Embedder.from_pretrained(checkpoint, device="cpu")
    work = module.RayEmbedding(embedder, "npy", model_dtype=asked)
    assert [given[1:3] for given in seen] == [("cuda", made)]
    assert work.placed == {"device": "cuda", "dtype": str(made).removeprefix("torch.")}


def test_a_job_whose_actor_is_killed(cluster, checkpoint, texts, tmp_path, monkeypatch):
    """The same ids and order as the job of one process, and the same values."""
    source = tmp_path / "in.txt"
    source.write_text("".join(f"{text}\n" for text in texts))
    embedder = Embedder.from_pretrained(checkpoint, device="cpu")

    def job(output, work):
        made = Job([str(source)], output, "embed", checkpoint, "npy", {}, part_rows=400)
        return run_job(made, work, Log(quiet=True))

    job(tmp_path / "one", Embedding(embedder, "npy"))
    monkeypatch.setattr(module, "CHUNK", 50)
    work = module.RayEmbedding(embedder, "npy", actors=2)
    before = [ray.get(actor.pid.remote()) for actor in work.actors]
    actors, after = list(work.actors), []
    get, landed = ray.get, threading.Event()

    def killing(reference):  # one dies while both have work
        if not landed.is_set():
            landed.set()
            os.kill(before[0], signal.SIGKILL)
        return get(reference)

    work.ray = type("Ray", (), {"get": staticmethod(killing), "kill": staticmethod(ray.kill)})
    close = work.close

    def closing():
        after[:] = [get(actor.pid.remote()) for actor in actors]
        close()

    work.close = closing
    done = job(tmp_path / "two", work)
    assert after[0] != before[0] and after[1] == before[1], "the killed actor was not started again"
    assert [part.rows for part in done.parts] == [400, 400, 400, 300]
    one, two = (list(Index(tmp_path / name).parts()) for name in ("one", "two"))
    assert [ids for ids, _ in one] == [ids for ids, _ in two]
    for (_, a), (_, b) in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_from_the_command_line(cluster, checkpoint, texts, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in texts[:100]))
    arguments = ["embed", "--model", checkpoint, "--device", "cpu", "--input", str(tmp_path / "in.txt"), "--quiet"]
    on_ray = [*arguments, "--engine", "ray", "--ray-actors", "2"]
    assert fastdistil.cli.main([*on_ray, "--output", str(tmp_path / "o")]) == 0
    expected = Embedder.from_pretrained(checkpoint, device="cpu").encode(texts[:100])
    np.testing.assert_allclose(np.load(tmp_path / "o" / "part-00000.npy"), expected, atol=1e-6)
    assert fastdistil.cli.main([*on_ray, "--output", str(tmp_path / "h"), "--output-dtype", "float16"]) == 0
    half = np.load(tmp_path / "h" / "part-00000.npy")
    assert half.dtype == np.float16 and np.abs(half - expected).max() < 1e-3
    assert fastdistil.cli.main([*on_ray, "--output", str(tmp_path / "p"), "--tokens-column", "ids"]) == 2
    assert "--engine ray takes texts" in capsys.readouterr().err
    assert fastdistil.cli.main([*arguments, "--output", str(tmp_path / "p"), "--ray-actors", "2"]) == 2
    assert "go with --engine ray" in capsys.readouterr().err
    assert fastdistil.cli.main([*on_ray, "--output", str(tmp_path / "p"), "--no-truncate"]) == 2
    assert "--engine ray takes texts" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["skip", "fail"])
def test_a_text_without_memory_fails_alone(checkpoint, tmp_path, monkeypatch, policy):
    embedder = Embedder.from_pretrained(checkpoint, device="cpu")
    compute = embedder._compute

    def limited(ids, *args):
        if len(ids) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(ids, *args)

    worker = object.__new__(module._Worker)
    worker.embedder, worker.max_batch_tokens = embedder, None
    actor = Mock()
    actor.encode.remote = worker.encode
    monkeypatch.setattr(embedder, "_compute", limited)
    monkeypatch.setattr(module, "CHUNK", 4)
    monkeypatch.setattr(module.RayEmbedding, "_start", lambda self, *_: setattr(self, "actors", [actor]))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    work = module.RayEmbedding(embedder, "npy")
    work.ray = Mock(get=lambda found: found)
    rows = [f"{'word ' * (60 if i == 6 else 3)}" for i in range(10)]
    if policy == "skip":  # an unreadable row before it
        rows[1] = None
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    job = Job([str(tmp_path / "in.jsonl")], tmp_path / "o", "embed", checkpoint, "npy", {}, on_error=policy)
    if policy == "fail":
        with pytest.raises(ValueError, match=r"in.jsonl, line 7: there is no memory for a text of 62 tokens"):
            run_job(job, work, Log(quiet=True))
        return
    assert run_job(job, work, Log(quiet=True)).rejected == 2
    rejects = [json.loads(line) for line in (tmp_path / "o" / "part-00000.rejects.jsonl").read_text().splitlines()]
    assert [r["row"] for r in rejects] == [1, 6] and "no memory for a text of 62 tokens" in rejects[1]["reason"]
    expected = embedder.encode([text for i, text in enumerate(rows) if i not in (1, 6)])
    np.testing.assert_allclose(np.load(tmp_path / "o" / "part-00000.npy"), expected, atol=1e-6)


def test_actors_put_the_prompt_before_texts(checkpoint):
    embedder = Embedder.from_pretrained(checkpoint, device="cpu", prompt="query: ")
    worker = object.__new__(module._Worker)
    worker.embedder, worker.max_batch_tokens = embedder, None
    found, errors = worker.encode(["a", "b c"])
    np.testing.assert_allclose(found, embedder.encode(["a", "b c"]), atol=1e-6)
    assert not errors and not np.allclose(found, embedder.encode(["a", "b c"], prompt=""), atol=1e-3)


@pytest.mark.parametrize(
    ("resources", "dtype", "actors", "message"),
    [
        ({"CPU": 4.0, "GPU": 2.0}, "float32", 3, "3 actors take one each of a cluster's 2 GPUs and 4 CPUs"),
        ({"CPU": 1.0, "GPU": 2.0}, "float32", 2, "2 actors take one each of a cluster's 2 GPUs and 1 CPUs"),
        ({"CPU": 4.0, "GPU": 2.0}, "int8", None, "dtype int8 is for CPU, and the cluster has GPUs"),
    ],
)
def test_what_actors_on_gpus_cannot_do(resources, dtype, actors, message, checkpoint, monkeypatch):
    for name, stub in (("is_initialized", lambda: False), ("init", Mock()), ("shutdown", Mock())):
        monkeypatch.setattr(ray, name, stub)
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    with pytest.raises(ValueError, match=message):
        module.RayEmbedding(Embedder.from_pretrained(checkpoint, "cpu", dtype), "npy", actors=actors)


def test_a_model_in_bfloat16_stays_so_on_gpus(checkpoint, monkeypatch):
    seen = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "remote", lambda **_: lambda cls: Mock(remote=lambda *given: seen.append(given)))
    module.RayEmbedding(Embedder.from_pretrained(checkpoint, "cpu", "bfloat16"), "npy")
    assert seen[0][2] is torch.bfloat16


@pytest.mark.parametrize(
    ("asked", "given", "found"), [(3, None, 3), (None, {"CPU": 2.0}, 2), (None, {"CPU": 0.0}, 1), (None, {}, 1)]
)
def test_an_actor_has_the_threads_that_ray_gave_it(asked, given, found, checkpoint, monkeypatch):
    """Ray sets OMP_NUM_THREADS to 1."""
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: Mock(get_assigned_resources=lambda: given))
    module.EmbedBatches(checkpoint, device="cpu", threads=asked)
    if asked is None:
        module._Worker(Embedder.from_pretrained(checkpoint, device="cpu"), "cpu", torch.float32, None)
    assert counts == [found] * (2 if asked is None else 1)


def test_an_actor_computes_as_it_is_told(checkpoint, monkeypatch):
    monkeypatch.setattr(module, "_set_threads", lambda threads: None)
    worker = module._Worker(Embedder.from_pretrained(checkpoint, device="cpu"), "meta", torch.float16, 100)
    assert worker.embedder.model.dtype is torch.float16 and worker.embedder.model.device.type == "meta"
    assert worker.pid() == os.getpid()
    worker.embedder = Mock()
    worker.encode(["a"])
    assert worker.embedder._encode.call_args.args[:2] == (["a"], 100)
    embed = module.EmbedBatches(checkpoint, output_column="vector", max_batch_tokens=100, device="cpu")
    monkeypatch.setattr(embed, "embedder", Mock())
    embed({"text": np.array(["a"])})
    assert embed.embedder.encode.call_args.args == (["a"], 100)
    with pytest.raises(TypeError, match="the batch is a list; give map_batches batch_format='numpy'"):
        embed(["a"])


def with_actors(monkeypatch, checkpoint, count, started):
    """-> (a job's work on `count` actors that answer when they are asked, they, the calls: (actor, how many chunks are
    under way))"""
    embedder, calls, flying = Embedder.from_pretrained(checkpoint, device="cpu"), [], []

    def actor(number):
        def remote(texts):
            flying.append(texts)
            calls.append((number, len(flying)))
            return lambda: (flying.remove(texts), embedder._encode(texts, None, False, None, None, 0, {}), {})[1:]

        return Mock(encode=Mock(remote=remote))

    for name, stub in (("is_initialized", lambda: not started), ("init", Mock())):
        monkeypatch.setattr(ray, name, stub)
    actors = [actor(number) for number in range(count)]
    monkeypatch.setattr(module.RayEmbedding, "_start", lambda self, *_: setattr(self, "actors", list(actors)))
    monkeypatch.setattr(module, "CHUNK", 4)
    work = module.RayEmbedding(embedder, "npy")
    work.ray = Mock(get=lambda found: found())
    return work, actors, calls


@pytest.mark.parametrize("started", [True, False])
def test_what_actors_are_given(started, checkpoint, texts, tmp_path, monkeypatch):
    """Two chunks each at a time, in turn; they end with the job, and so does a cluster that was started for it."""
    work, actors, calls = with_actors(monkeypatch, checkpoint, 2, started)
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in texts[:30]))
    job = Job([str(tmp_path / "in.txt")], tmp_path / "o", "embed", checkpoint, "npy", {}, part_rows=20)
    done = run_job(job, work, Log(quiet=True))
    assert [number for number, _ in calls] == [0, 1] * 4 and [most for _, most in calls] == [1, 2, 3, *[4] * 5]
    assert [part.rows for part in done.parts] == [20, 10] and work.answered() == (30, None)
    assert work.bottleneck() == "actors"
    found = np.concatenate([vectors for _, vectors in Index(tmp_path / "o").parts()])
    np.testing.assert_allclose(found, work.embedder.encode(texts[:30]), atol=1e-6)
    assert [call.args[0] for call in work.ray.kill.call_args_list] == actors
    assert work.ray.shutdown.called == started


def test_parts_are_there_as_soon_as_they_are_whole(checkpoint, texts, tmp_path, monkeypatch):
    """A job that is stopped has lost what the actors had, and nothing before."""
    work, actors, _ = with_actors(monkeypatch, checkpoint, 2, False)
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in texts[:40]))
    get, answered = work.ray.get, []

    def interrupted(found):
        if len(answered) == 7:
            raise KeyboardInterrupt
        answered.append(found)
        return get(found)

    work.ray.get = interrupted
    job = Job([str(tmp_path / "in.txt")], tmp_path / "o", "embed", checkpoint, "npy", {}, part_rows=8)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, work, Log(quiet=True))
    assert len(list((tmp_path / "o").glob("part-*.npy"))) == 3
    assert [call.args[0] for call in work.ray.kill.call_args_list] == actors and not work.actors


def test_actors_are_started_again_without_end(checkpoint, monkeypatch):
    """A job outlives its machines."""
    options, seen = {}, []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 3.0})
    monkeypatch.setattr(ray, "put", lambda value: ("put", value))

    def remote(**given):
        options.update(given)
        return lambda cls: Mock(remote=lambda *args: seen.append(args))

    monkeypatch.setattr(ray, "remote", remote)
    embedder = Embedder.from_pretrained(checkpoint, device="cpu")
    work = module.RayEmbedding(embedder, "npy", max_batch_tokens=100)
    assert options == {"max_restarts": -1, "max_task_retries": -1, "num_cpus": 1, "num_gpus": 0}
    assert seen == [(("put", embedder), "cpu", torch.float32, 100)] * 3 and work.placed == {}
    seen.clear()
    module.RayEmbedding(embedder, "npy", actors=9)  # on somebody's cluster, which may grow
    assert len(seen) == 9
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 3.0, "GPU": 2.0})
    module.RayEmbedding(embedder, "npy")
    assert len(seen) == 11 and options["num_gpus"] == 1


def test_how_a_cluster_is_found(checkpoint, monkeypatch):
    """RAY_ADDRESS as Ray reads it; one that is started here has the CPUs that were asked for."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(module.RayEmbedding, "_start", lambda self, *_: None)
    embedder, asked, reached = Embedder.from_pretrained(checkpoint, device="cpu"), [], []
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options))
    monkeypatch.setattr(module, "_reach", reached.append)
    for address, variable, alone in (
        *[(None, None, True), (None, "", True), (None, "local", True), ("local", None, True)],
        *[(None, "10.0.0.1:6379", False), ("auto", None, False), ("10.0.0.2:6379", "10.0.0.1:6379", False)],
    ):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        if variable is not None:
            monkeypatch.setenv("RAY_ADDRESS", variable)
        work = module.RayEmbedding(embedder, "npy", address=address, num_cpus=7)
        assert work.alone is alone and asked[-1]["address"] == address and reached[-1] == (address or variable or "")
        assert ("num_cpus" in asked[-1]) is alone and asked[-1].get("num_cpus", 7) == 7


def test_an_ipv6_cluster_where_nobody_listens():
    with pytest.raises(ConnectionError, match=r"there is no Ray cluster at \[::1\]:1") as raised:
        module._reach("[::1]:1")
    assert not isinstance(raised.value.__cause__, socket.gaierror), "[::1] was taken for a name"
    with pytest.raises(ConnectionError, match="there is no Ray cluster at localhost:99999"):
        module._reach("localhost:99999")
    module._reach("auto")


@pytest.mark.parametrize("good", [4, 0])
def test_parts_of_bad_rows_alone(good, checkpoint, tmp_path, monkeypatch):
    work, _, calls = with_actors(monkeypatch, checkpoint, 1, False)
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n' * good + "{}\n" * 6)
    job = Job(
        [str(tmp_path / "in.jsonl")], tmp_path / "o", "embed", checkpoint, "npy", {}, on_error="skip", part_rows=4
    )
    done = run_job(job, work, Log(quiet=True))
    assert len(calls) == (good > 0) and done.finished
    assert [part.rows for part in done.parts] == [*[4] * (good > 0), 0, 0]


def test_a_cluster_elsewhere_may_grow(checkpoint, monkeypatch):
    """More actors than it has CPUs wait there until it has."""
    for name, stub in (("is_initialized", lambda: False), ("init", Mock()), ("put", lambda value: value)):
        monkeypatch.setattr(ray, name, stub)
    monkeypatch.setattr(module, "_reach", lambda address: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "remote", lambda **_: lambda cls: Mock())
    embedder = Embedder.from_pretrained(checkpoint, device="cpu")
    assert len(module.RayEmbedding(embedder, "npy", actors=6, address="auto").actors) == 6
