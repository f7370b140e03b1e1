"""Embedding on a Ray cluster: an actor class for `Dataset.map_batches`, and a job whose parts are computed by actors.

Source: Ray (Moritz et al., 2018, arXiv:1712.05889) and Ray Data.
"""

import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from fastdistil.engine import Embedder
from fastdistil.jobs.run import Embedding, Rows

CHUNK = 2_048  # rows that an actor gets at once
AHEAD = 2  # chunks an actor has before it answers the first


class EmbedBatches:
    """For `ray.data.Dataset.map_batches`: adds a column of embeddings, float32 [rows, dim], to each batch.

        dataset.map_batches(EmbedBatches, fn_constructor_kwargs={"model": "..."}, compute=ActorPoolStrategy(size=2),
                            batch_size=4096, num_gpus=1)

    The model is loaded once an actor; a batch of rows is divided by tokens inside. model, and options: as
    Embedder.from_pretrained. threads: of torch on CPU, by default the CPUs that Ray gave the actor.
    """

    def __init__(
        self,
        model: str,
        text_column: str = "text",
        output_column: str = "embedding",
        max_batch_tokens: int | None = None,
        threads: int | None = None,
        **options: Any,
    ):
        _set_threads(threads)
        self.embedder = Embedder.from_pretrained(model, **options)
        self.text_column, self.output_column, self.max_batch_tokens = text_column, output_column, max_batch_tokens

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not isinstance(batch, dict):
            raise TypeError(f"the batch is a {type(batch).__name__}; give map_batches batch_format='numpy'")
        if self.text_column not in batch:
            raise ValueError(f"the batch has no column {self.text_column!r} among {', '.join(map(repr, batch))}")
        texts = list(batch[self.text_column])
        return batch | {self.output_column: self.embedder.encode(texts, self.max_batch_tokens, show_progress=False)}


def _set_threads(threads: int | None) -> None:
    if threads is None:
        import ray

        # Ray sets OMP_NUM_THREADS to 1 in an actor that asked for no CPUs
        threads = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)) or 1
    torch.set_num_threads(threads)


class _Worker:
    """One actor of a job."""

    def __init__(self, embedder: Embedder, device: str, dtype: torch.dtype, max_batch_tokens: int | None):
        _set_threads(None)
        embedder.model.to(device=device, dtype=dtype)
        self.embedder, self.max_batch_tokens = embedder, max_batch_tokens

    def pid(self) -> int:
        return os.getpid()

    def encode(self, texts: list[str]) -> tuple[np.ndarray, dict[int, str]]:
        """Embeddings, and why there is none of a text that takes more memory than there is."""
        errors: dict[int, str] = {}
        return self.embedder._encode(texts, self.max_batch_tokens, False, None, None, 0, errors), errors


def _reach(address: str) -> None:
    """ConnectionError where nobody listens at host:port: Ray itself goes on trying for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        if int(port) > 65_535:  # which the system would take for another
            raise ConnectionError(f"there is no Ray cluster at {address}: a port is at most 65535")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, UnicodeError) as error:
            raise ConnectionError(f"there is no Ray cluster at {address}: {error}") from error


class RayEmbedding(Embedding):
    """The work of an embedding job, done by actors of a cluster; reading and writing stay in this process.

    address: of a running cluster, "auto" for the one of this machine, None for one that is started and stopped here.
    model_dtype: of the actors' model; "auto" makes float32 float16 on GPUs.
    actors: how many, by default one a GPU, or one a CPU. An actor that dies is started again, and what it had to do is
    done again. The embedder is sent to the actors, which need no files.
    """

    def __init__(
        self,
        embedder: Embedder,
        form: str,
        *,
        address: str | None = None,
        actors: int | None = None,
        max_batch_tokens: int | None = None,
        dtype: str = "float32",
        num_cpus: int | None = None,
        model_dtype: str = "auto",
    ):
        super().__init__(embedder, form, max_batch_tokens=max_batch_tokens, dtype=dtype)
        try:
            import ray
        except ImportError as error:
            raise ValueError("the Ray engine needs ray; install fastdistil[ray]") from error
        self.ray = ray
        where = address or os.environ.get("RAY_ADDRESS")
        self.started, self.alone = not ray.is_initialized(), where in (None, "", "local")
        if self.started:
            _reach(where or "")
            options = {"num_cpus": num_cpus, "include_dashboard": False} if self.alone else {}
            before = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(address=address, log_to_driver=False, configure_logging=False, **options)
            finally:
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, before)  # Ray's own ends the process with a stack of its
        self.actors: list[Any] = []
        try:
            self._start(embedder, actors, max_batch_tokens, model_dtype)
        except BaseException:
            self.close()  # a cluster that was started here goes on otherwise
            raise

    def _start(self, embedder: Embedder, actors: int | None, max_batch_tokens: int | None, dtype: str) -> None:
        ray = self.ray
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        count = actors or gpus or cpus
        on_gpu = gpus > 0
        if self.started and self.alone and count > (min(gpus, cpus) if on_gpu else cpus):  # they would wait for ever
            what = f"{gpus} GPUs and {cpus} CPUs" if on_gpu else f"{cpus} CPUs"
            raise ValueError(f"{count} actors take one each of a cluster's {what}; ask for fewer")
        if on_gpu and embedder.model.precision == "int8":
            raise ValueError("dtype int8 is for CPU, and the cluster has GPUs; use float16")
        half = on_gpu and dtype == "auto" and embedder.model.dtype is torch.float32
        model_dtype = torch.float16 if half else embedder.model.dtype
        # for a job's fingerprint
        self.placed = {"device": "cuda", "dtype": str(model_dtype).removeprefix("torch.")} if on_gpu else {}
        self._shipped = ray.put(embedder)  # held here: an actor that is started again asks for it again
        # endless restarts and retries: a job outlives its machines
        worker = ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=1, num_gpus=int(on_gpu))(_Worker)
        self.actors = [
            worker.remote(self._shipped, "cuda" if on_gpu else "cpu", model_dtype, max_batch_tokens)
            for _ in range(count)
        ]

    def bottleneck(self) -> str | None:
        return "actors"

    def answered(self) -> tuple[int, int | None]:
        return self._rows, None  # the actors keep their tokens to themselves

    def run(self, parts: Iterable[Rows]) -> Iterator[Rows]:
        """Chunks go to the actors in turn, and come back in their order."""
        flying: deque[tuple[Rows, int, Any]] = deque()
        waiting: deque[Rows] = deque()
        turn = 0

        def land(most: int) -> Iterator[Rows]:
            while len(flying) > most:
                part, first, answer = flying.popleft()
                found, errors = self.ray.get(answer)
                self._put(part, np.arange(first, first + len(found)), found)
                part.errors |= {part.usable[first + row]: error for row, error in errors.items()}
                part.left, self._rows = part.left - len(found), self._rows + len(found)
                while waiting and not waiting[0].left:
                    yield self._whole(waiting.popleft())

        try:
            for part in parts:
                texts = [part.rows[p].text for p in part.usable]
                part.answers, part.left = np.empty((len(texts), self.embedder.dim), self.dtype), len(texts)
                waiting.append(part)
                for first in range(0, len(texts), CHUNK):
                    yield from land(AHEAD * len(self.actors) - 1)
                    actor = self.actors[turn % len(self.actors)]
                    flying.append((part, first, actor.encode.remote(texts[first : first + CHUNK])))
                    turn += 1
            yield from land(0)
            yield from map(self._whole, waiting)
        finally:
            self.close()

    def close(self) -> None:
        for actor in self.actors:
            self.ray.kill(actor)
        self.actors = []
        if self.started:
            self.ray.shutdown()
