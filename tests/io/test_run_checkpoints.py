"""Checkpoints of a run: bit for bit, and whole whatever happens."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from rfjax.errors import UserError
from rfjax.io.run_checkpoints import Checkpoints

READER = {"next_index": 12, "inner": {"epoch": 1}}
SETTINGS = {"learning_rate": 1e-4}


def make_state(seed: int, rows: int = 300):
    key = jax.random.key(seed)
    weight = jax.random.normal(key, (rows, 70)).at[0, 0].set(jnp.nan).at[0, 1].set(-0.0)
    params = {"blocks": {"kernel": weight, "half": weight.astype(jnp.bfloat16)}}
    return {
        "params": params,
        "moments": optax.adamw(1e-3).init(params),
        "step": jnp.int32(seed),
        "flag": jnp.array([True, False, True]),
    }


def abstract(state):
    here = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), state)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def write(folder, steps, keep=5, rows=300):
    lines = []
    with Checkpoints(folder, keep, lines.append) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step, rows), READER | {"at": step}, SETTINGS)
    assert lines == []


def run(code: str, *args, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_state_comes_back_bit_for_bit_though_its_buffers_were_given_away(tmp_path):
    change = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: ~leaf if leaf.dtype == bool else leaf + 1, tree), donate_argnums=0
    )
    with Checkpoints(tmp_path, 2) as checkpoints:
        state = make_state(3, rows=4000)
        expected = jax.tree.map(np.array, state)
        assert checkpoints.latest is None
        assert checkpoints.save(3, state, READER, SETTINGS)
        for _ in range(3):
            state = change(state)
        assert checkpoints.wait()
        step, found, reader = checkpoints.restore(None, abstract(expected))
        assert (step, reader, checkpoints.settings(3)) == (3, READER, SETTINGS)
        assert_same_bits(found, expected)


def test_newest_stay_and_what_a_killed_run_left_is_removed(tmp_path):
    for leftover in ("00000009.orbax-checkpoint-tmp", ".rfjax-0123.part"):
        (tmp_path / leftover / "state").mkdir(parents=True)
    write(tmp_path, [1, 5, 10, 1000], keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000010", "00001000"]


def test_step_that_is_there_is_not_written_again(tmp_path):
    write(tmp_path, [7])
    before = (tmp_path / "00000007" / "record" / "metadata").stat().st_mtime_ns
    write(tmp_path, [7])
    assert (tmp_path / "00000007" / "record" / "metadata").stat().st_mtime_ns == before


def arrays_file(folder):
    return max(folder.rglob("state/**/d/*"), key=lambda path: path.stat().st_size)


def flip_a_bit(folder):
    file = arrays_file(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGES = {
    "truncated": lambda folder: os.truncate(arrays_file(folder), 1000),
    "a bit": flip_a_bit,
    "zeros": lambda folder: arrays_file(folder).write_bytes(bytes(arrays_file(folder).stat().st_size)),
    "array missing": lambda folder: arrays_file(folder).unlink(),
    "manifest missing": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "record": lambda folder: os.truncate(folder / "record" / "metadata", 50),
    "record of something else": lambda folder: (folder / "record" / "metadata").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage, capfd):
    write(tmp_path, [1, 2], rows=30)
    damage(tmp_path / "00000002")
    lines = []
    with Checkpoints(tmp_path, 3, lines.append) as checkpoints:
        with pytest.raises(UserError, match=r"00000002.* is damaged"):
            checkpoints.restore(2, abstract(make_state(2, rows=30)))
        step, state, reader = checkpoints.restore(None, abstract(make_state(1, rows=30)))
        assert (step, reader["at"]) == (1, 1)
        assert_same_bits(state, make_state(1, rows=30))
        assert len(lines) == 1
        assert "00000002 is damaged" in lines[0]
        assert "00000002.damaged" in lines[0]
        assert checkpoints.latest == 1
        assert checkpoints.save(2, make_state(2, rows=30), READER, SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002", "00000002.damaged"]
    assert capfd.readouterr() == ("", "")


def test_no_checkpoint_or_all_damaged_is_said(tmp_path):
    write(tmp_path, [1])
    DAMAGES["truncated"](tmp_path / "00000001")
    lines = []
    with Checkpoints(tmp_path, 1, lines.append) as checkpoints:
        with pytest.raises(UserError, match="no checkpoint of step 4; it has 1"):
            checkpoints.restore(4, abstract(make_state(1)))
        with pytest.raises(UserError, match="no checkpoint that can be restored"):
            checkpoints.restore(None, abstract(make_state(1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["params"]["blocks"].update(kernel=jnp.zeros((5, 70))),
            r"blocks\.kernel as float32\[300, 70\]; .*\[5, 70\]",
        ),
        (lambda s: s.update(step=jnp.float32(0)), r"step as int32\[\]; this run needs float32\[\]"),
        (lambda s: s.update(ema=jnp.zeros(3)), "lacks ema"),
        (lambda s: s.pop("flag"), "has flag, which this run has not"),
    ],
    ids=["shape", "type", "lacking", "left over"],
)
def test_state_of_other_sizes_names_the_parameter(tmp_path, change, message):
    write(tmp_path, [1])
    state = make_state(1)
    change(state)
    with Checkpoints(tmp_path, 1) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore(None, abstract(state))
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    import jax
    from test_run_checkpoints import *
    folder, limited = Path(sys.argv[1]), len(sys.argv) > 2
    with Checkpoints(folder, 1) as checkpoints:
        assert checkpoints.save(1, make_state(1), READER, SETTINGS) and checkpoints.wait()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if limited:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        checkpoints.save(2, make_state(2, rows=10_000), READER, SETTINGS)
        assert not checkpoints.wait()
        assert [path.name for path in folder.iterdir()] == ["00000001"]
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert checkpoints.save(3, make_state(3), READER, SETTINGS) and checkpoints.wait()
        assert [path.name for path in folder.iterdir()] == ["00000003"]
        assert_same_bits(checkpoints.restore(None, abstract(make_state(3)))[1], make_state(3))
"""


def test_failing_disk_is_one_line_and_the_older_checkpoint_stays(tmp_path):
    done = run(FULL_DISK, tmp_path, "limited")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("warning: the checkpoint of step 2 is not saved: ")


MANY_FAILING = """
    import resource, sys
    from pathlib import Path
    from test_run_checkpoints import *
    states = {name: make_state(2, rows=2_000) for name in "abcd"}
    with Checkpoints(Path(sys.argv[1]), 1) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        for step in range(5):
            checkpoints.save(step, states, READER, SETTINGS)
            assert not checkpoints.wait()
"""


def test_arrays_that_fail_together_are_one_line_for_each_checkpoint(tmp_path):
    done = run(MANY_FAILING, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line.split(" is not saved")[0] for line in lines] == [
        f"warning: the checkpoint of step {step}" for step in range(5)
    ]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Error writing local file: Failed to write [OS error 28: ENOSPC]"),
    ],
    ids=["python", "tensorstore"],
)
def test_a_full_disk_is_named_whoever_finds_it(tmp_path, monkeypatch, error):
    lines: list[str] = []

    def full(*_, **__):
        raise error

    with Checkpoints(tmp_path, 1, lines.append) as checkpoints:
        assert checkpoints.save(1, make_state(1), READER, SETTINGS)
        assert checkpoints.wait()
        monkeypatch.setattr(checkpoints._writer, "save", full)
        assert not checkpoints.save(2, make_state(2), READER, SETTINGS)
    assert lines == ["warning: the checkpoint of step 2 is not saved: no space left on the disk; the older ones stay"]
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


def test_full_disk_is_one_line_and_the_older_checkpoint_stays(tmp_path):
    # In a user namespace, where also others than root may mount.
    inside = f'mount -t tmpfs -o size=2m tmpfs {tmp_path} && exec "$@"'
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", inside, "sh"]
    try:
        subprocess.run([*mount, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small file system cannot be mounted here")
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    command = [*mount, sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "warning: the checkpoint of step 2 is not saved: no space left on the disk; the older ones stay\n"
    )


SAVING = """
    import sys
    from pathlib import Path
    from test_run_checkpoints import *
    with Checkpoints(Path(sys.argv[1]), 2) as checkpoints:
        like = abstract(make_state(0, rows=20_000))
        step = -1
        if checkpoints.latest is not None:
            step, state, reader = checkpoints.restore(checkpoints.latest, like)
            assert_same_bits(state, make_state(step, rows=20_000))
            assert reader == {"at": step}
        print("restored", step, flush=True)
        while True:
            step += 1
            assert checkpoints.save(step, make_state(step, rows=20_000), {"at": step}, SETTINGS)
"""


@pytest.mark.slow
def test_last_checkpoint_survives_kills_at_any_moment(tmp_path):
    rng = random.Random(0)
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    reached = []
    for _ in range(10):
        command = [sys.executable, "-c", textwrap.dedent(SAVING), str(tmp_path)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("restored"), "the checkpoint of the killed process cannot be restored"
            reached.append(int(line.split()[1]))
            time.sleep(rng.uniform(0.3, 1.5))
            process.send_signal(signal.SIGKILL)
    assert reached == sorted(reached)
    assert reached[-1] > 3
    assert not list(tmp_path.glob("*.damaged"))


def test_other_number_of_devices(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from jax.sharding import NamedSharding, PartitionSpec
        from test_run_checkpoints import *
        mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        rows, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (["fsdp"], []))
        with Checkpoints(Path(sys.argv[1]), 2) as checkpoints:
            shardings = jax.tree.map(lambda leaf: rows if leaf.shape[:1] == (320,) else whole, make_state(1, rows=320))
            like = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                make_state(1, rows=320), shardings,
            )
            _, state, _ = checkpoints.restore(None, like)
            assert_same_bits(state, make_state(1, rows=320))
            assert state["params"]["blocks"]["kernel"].addressable_shards[0].data.shape == (40, 70)
            assert checkpoints.save(2, jax.device_put(make_state(2, rows=320), shardings), READER, SETTINGS)
    """
    write(tmp_path, [1], rows=320)
    done = run(code, tmp_path, JAX_NUM_CPU_DEVICES="8")
    assert done.returncode == 0, done.stderr
    with Checkpoints(tmp_path, 2) as checkpoints:
        step, state, _ = checkpoints.restore(None, abstract(make_state(2, rows=320)))
        assert step == 2
        assert_same_bits(state, make_state(2, rows=320))
