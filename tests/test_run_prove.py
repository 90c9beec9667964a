"""``restrictedmem run --prove`` without the attempts, which test_audit_prove.py has."""

from collections.abc import Callable

import pytest

from planting import noting, stub
from restrictedmem.audit import prove
from restrictedmem.cli import run
from restrictedmem.cli.main import parser


@pytest.mark.parametrize("proved", [True, False])
@pytest.mark.parametrize("json", ["", "FILE", "-"])
@pytest.mark.parametrize("how", ["--prove", "--prove=as-root"])
def test_the_status_says_whether_it_is_proved(
    how: str, json: str, proved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[object, ...]] = []

    def prove_main(service: object, **options: object) -> object:
        calls.append(("prove", service, options["as_root"], options["memory"], options["quiet"]))
        return stub(proved=proved, attempts="attempts", as_data=lambda: "data")

    monkeypatch.setattr(prove, "prove_main", prove_main)
    monkeypatch.setattr(prove, "show", noting(calls, "show"))
    write: Callable[[object], None] | None = noting(calls, "write") if json else None
    arguments = ["run", how, "--quiet", "--memory", "8M", *(["--json", json] if json else [])]
    found = run._prove(parser("run").parse_args(arguments), "the service", write)  # type: ignore[arg-type]
    assert found == (0 if proved else 1)
    assert calls == [
        ("prove", "the service", how == "--prove=as-root", 8 << 20, True),
        *([("show", "attempts")] if json != "-" else []),
        *([("write", "data")] if json else []),
    ]
