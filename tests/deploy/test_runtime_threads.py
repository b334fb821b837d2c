"""The threads that compute: every step's own, or one pool for all that a process runs.

Every test is a process of its own: what threads a process shares is settled once.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_exports

from treeify.deploy import runtime

BEGIN = """
import contextlib, multiprocessing, os, sys
import numpy, onnxruntime
from anytime import Anytime, EngineError, InputError

images = numpy.zeros((2, 3, 4, 4), numpy.float32)
onnxruntime.get_available_providers()

def threads():
    return len(os.listdir("/proc/self/task"))

@contextlib.contextmanager
def raises(kind, text):
    try:
        yield
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(kind)

def opened(**options):
    before = threads()
    model = Anytime("tiny", preload="none", **options)
    model.predict(images)
    return threads() - before
"""
FORK = """
def answer(queue):
    with raises(EngineError, "forked"):
        opened(threads=3, shared_threads=True)
    queue.put("refused")

opened(threads=3, shared_threads=True)
context = multiprocessing.get_context("fork")
queue = context.Queue()
child = context.Process(target=answer, args=(queue,))
child.start()
assert queue.get(timeout=60) == "refused"
child.join(60)
"""
CASES = {
    "steps have threads of their own": "assert opened(threads=3) == 3 * 2",
    "one thread is the caller's": "assert opened(threads=1) == 0",
    "all steps and models may share one pool": """
shared = [opened(threads=3, shared_threads=True) for _ in range(2)]
assert shared == [2, 0]
assert opened(shared_threads=True) == 0
""",
    "sharing is for one number of threads": """
opened(threads=3, shared_threads=True)
with raises(EngineError, "threads=3, as the first"):
    opened(threads=2, shared_threads=True)
""",
    "where threads are shared all share them": """
opened(threads=3, shared_threads=True)
with raises(EngineError, "Pass shared_threads=True"):
    opened(threads=3)
""",
    "threads that the user made": """
onnxruntime.set_global_thread_pool_sizes(4, 1)
with raises(EngineError, "already been created"):
    opened(threads=3, shared_threads=True)
""",
    "an engine that shares none": """
del onnxruntime.set_global_thread_pool_sizes
with raises(EngineError, "cannot share"):
    opened(threads=3, shared_threads=True)
""",
    "wrong arguments": """
with raises(InputError, "spinning"):
    opened(shared_threads=True, spinning=False)
with raises(InputError, "engine"):
    opened(shared_threads=True, engine="openvino")
""",
    "a forked process": FORK,
}


@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them"
)
@pytest.mark.parametrize("case", CASES)
def test_threads(case: str, tmp_path: Path) -> None:
    tiny_exports.write(tmp_path / "tiny")
    (tmp_path / "anytime.py").write_bytes(Path(runtime.__file__).read_bytes())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEGIN + CASES[case]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
