"""Compiling C at first use: once, whatever happens at the same time; who has no compiler learns why."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.cache import CACHE_VARIABLE
from pipeline.kernels import native as module
from pipeline.kernels.native import native

ADD = "int add(int a, int b) { return a + b; }\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    path = tmp_path / "sum.c"
    path.write_text(ADD)
    native.cache_clear()
    return path


def libraries(source: Path) -> list[Path]:
    return sorted((source.parent / "cache" / "kernels").iterdir())


def add(source: Path, first: int, second: int) -> int:
    library, reason = native.__wrapped__(source)
    assert library is not None, reason
    return library.add(first, second)


def test_a_source_is_compiled_once_and_anew_when_it_changes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert add(source, 2, 3) == 5
    (first,) = libraries(source)
    made = first.stat().st_mtime_ns
    assert add(source, 4, 5) == 9
    assert [path.stat().st_mtime_ns for path in libraries(source)] == [made]
    source.write_text(ADD.replace("a + b", "a - b"))
    other = source.rename(source.with_name("difference.c"))  # a loaded library of the same name would be kept
    assert add(other, 2, 3) == -1
    assert len(libraries(source)) == 2
    monkeypatch.setattr(module, "_FLAGS", (*module._FLAGS, "-O1"))
    assert add(other, 2, 3) == -1
    assert len(libraries(source)) == 3


def test_processes_that_compile_at_once_all_get_it_and_leave_one(source: Path) -> None:
    script = f"from pathlib import Path; from pipeline.kernels.native import native; \
print(native(Path({str(source)!r})).library.add(20, 22))"
    command = [sys.executable, "-c", script]

    def run(_: int) -> str:
        return subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True).stdout

    with ThreadPoolExecutor() as pool:
        assert set(pool.map(run, range(4))) == {"42\n"}
    assert len(libraries(source)) == 1


def test_a_library_that_was_cut_short_is_made_anew(source: Path) -> None:
    script = f"from pathlib import Path; from pipeline.kernels.native import native; native(Path({str(source)!r}))"
    subprocess.run([sys.executable, "-c", script], check=True)
    (library,) = libraries(source)
    library.write_bytes(library.read_bytes()[:100])
    assert add(source, 1, 1) == 2


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(source: Path) -> None:
    directory = source.parent / "cache" / "kernels"
    directory.mkdir(parents=True)
    left, written = (directory / f"{name}.unfinished" for name in ("left", "written"))
    for path in (left, written):
        path.touch()
    os.utime(left, (0, 0))
    assert add(source, 1, 2) == 3
    assert written in libraries(source)
    assert left not in libraries(source)


def test_who_has_no_compiler_or_cannot_keep_anything_learns_why(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write_text("int add(int a, int b) { return a + ; }\n")
    library, reason = native.__wrapped__(source)
    assert library is None
    assert "error" in reason
    assert libraries(source) == []
    source.write_text(ADD)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", "")
        patched.delenv("CC", raising=False)
        assert native.__wrapped__(source) == (None, "there is no C compiler (cc, gcc or clang)")
    (source.parent / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(source.parent / "file"))
    library, reason = native.__wrapped__(source)
    assert library is None
    assert "file" in reason


def test_torch_and_a_kernel_share_one_openmp(source: Path) -> None:
    import torch

    source.write_text(
        "#include <omp.h>\n"
        "int count(int n) { int c = 0;\n#pragma omp parallel num_threads(n) reduction(+:c)\nc += 1; return c; }\n"
        "int most(void) { return omp_get_max_threads(); }\n"
    )
    library, reason = native.__wrapped__(source)
    assert isinstance(library, ctypes.CDLL), reason
    assert library.count(3) == 3
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        assert library.most() == 5
    finally:
        torch.set_num_threads(before)


def test_what_is_compiled_ahead_is_waited_for_and_not_compiled_again(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.with_name("product.c").write_text(ADD.replace("a + b", "a * b"))
    compiler, calls = source.with_name("compiler"), source.with_name("calls")
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *version*) ;; *) sleep 0.3; echo "$*" >> ' + str(calls) + ' ;; esac\nexec gcc "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(module, "_HERE", source.parent)
    module.compile_ahead()
    assert add(source, 5, 6) == 11
    assert add(source.with_name("product.c"), 5, 6) == 30
    assert len(calls.read_text().splitlines()) == 2


def test_a_source_that_cannot_be_compiled_ahead_is_told_of_when_it_is_needed(
    source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source.write_text("int add(int a, int b) { return a + ; }\n")
    monkeypatch.setattr(module, "_HERE", source.parent)
    module.compile_ahead()
    library, reason = native.__wrapped__(source)
    assert library is None
    assert "error" in reason
    assert capfd.readouterr().err == ""
