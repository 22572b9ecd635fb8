"""``report``, ``models``, ``config``, ``doctor`` and ``keys``: what is there, what was recorded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dgiqa_stream.cli import _shared as shared
from dgiqa_stream.errors import ConfigError, ModelError


def report(
    recording: Annotated[
        Path, typer.Argument(metavar="RESULT.ndjson", parser=shared.path_with_a_name)
    ],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The HTML; beside the recording.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="The score curve as a picture, too.")] = None,
    log_level: shared.Level = shared.LogLevel.WARNING,
) -> None:
    """Make a self-contained HTML report of a recording of ``watch`` or ``score``."""
    shared.set_up_logging(log_level)
    from dgiqa_stream.inputs import refuse_overwriting
    from dgiqa_stream.recording import read_recording
    from dgiqa_stream.report import write_html, write_png

    html = output or recording.with_suffix(".html")
    for path in (html, *([png] if png else [])):
        refuse_overwriting(str(path), [str(recording)])
    read = read_recording(recording)
    write_html(read, html)
    shared.say(f"report: {html}")
    if png is not None:
        write_png(read, png)
        shared.say(f"plot: {png}")


def models(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[verify [MODEL...]]",
            help="Nothing lists. verify tries each model, a name or a .onnx; the shipped ones.",
        ),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Whole manifests.")] = False,
) -> None:
    """List the models that came with this package, each checked against its manifest.

    With verify, try any: hash, manifest, inputs, outputs and a score. It needs no network; exit
    code 0 where all are fine, 5 where one is not.
    """
    if words:
        if words[0] != "verify":
            raise ConfigError(f"models {' '.join(words)!r}: give nothing, or `verify [MODEL...]`")
        shared.leave(_verify(words[1:], as_json=as_json))
    import msgspec

    from dgiqa_stream.manifest import DEFAULT_MODEL, load_model, shipped_models

    loaded = {name: load_model(name).manifest for name in shipped_models()}
    if as_json:
        json.dump({n: msgspec.to_builtins(m) for n, m in loaded.items()}, sys.stdout, indent=1)
        sys.stdout.write("\n")
        return
    sys.stdout.write("name\tversion\tprecision\tmade for\tparameters\tbytes\tlicence\tsha256\n")
    for name, m in loaded.items():
        shown = f"{name} (default)" if name == DEFAULT_MODEL else name
        made = (m.version, m.precision, m.target)
        fields = (shown, *made, m.num_parameters, m.size_bytes, m.licence, m.sha256[:12])
        sys.stdout.write("\t".join(map(str, fields)) + "\n")


def _verify(names: list[str], *, as_json: bool) -> int:
    """Try each model, go on after a bad one, and return the exit code."""
    from dgiqa_stream.manifest import shipped_models

    found: dict[str, dict[str, Any]] = {}
    for name in names or shipped_models():
        try:
            found[name] = _tried(name)
        except ModelError as exc:
            text = str(exc) if name in str(exc) else f"{name}: {exc}"
            shared.complain(text)
            found[name] = {"error": text}
    if as_json:
        json.dump(found, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        sys.stdout.write("model\tversion\tsha256\tinputs\toutputs\tscore\n")
        for name, facts in found.items():
            if "error" not in facts:
                sys.stdout.write("\t".join((name, *_told(facts))) + "\n")
    return shared.BROKEN if any("error" in facts for facts in found.values()) else shared.OK


def _tried(name: str) -> dict[str, Any]:
    """What is true of a model that scores; raises :class:`ModelError` where anything is wrong."""
    from dgiqa_stream.config import SourceSettings
    from dgiqa_stream.manifest import load_model
    from dgiqa_stream.scorer import load_scorer
    from dgiqa_stream.sources import open_source

    loaded = load_model(name)
    manifest, num_bytes = loaded.manifest, loaded.path.stat().st_size
    if num_bytes != manifest.size_bytes:
        raise ModelError(
            f"{loaded.path.name} has {num_bytes} bytes, its manifest says {manifest.size_bytes}: "
            "export it again with `dgiqa-quant export`"
        )
    with load_scorer(name, device="cpu") as scorer:  # which checks the graph's inputs and outputs
        source = open_source(
            "pattern:clean?size=640x360&fps=25&seconds=1", SourceSettings(), stream="verify"
        )
        (prediction,) = scorer.predict([next(iter(source.frames())).planes])
    more = [spec.output for spec in (manifest.interval, manifest.domain) if spec is not None]
    return {
        "file": str(loaded.path),
        "version": manifest.version,
        "sha256": manifest.sha256,
        "inputs": {view.name: list(view.shape) for view in manifest.preprocess.views},
        "outputs": [manifest.output.name, *more],
        "score": prediction.score,
    }


def _told(facts: dict[str, Any]) -> tuple[str, ...]:
    """The columns of a row."""
    inputs = (f"{name} {'x'.join(map(str, shape))}" for name, shape in facts["inputs"].items())
    outputs = ", ".join(facts["outputs"])
    return (
        facts["version"],
        facts["sha256"][:12],
        ", ".join(inputs),
        outputs,
        f"{facts['score']:.2f}",
    )


def config(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[check FILE]", help="Nothing prints the default.")
    ] = None,
) -> None:
    """Print the documented default configuration, or check a file as far as ``watch`` would get
    without opening a source or an output: streams, publisher, keys, model and device.
    """
    from dgiqa_stream.cli._streams import as_in_file, check_settings
    from dgiqa_stream.config import default_file, load_config

    if not words:
        sys.stdout.write(default_file())
        return
    if len(words) != 2 or words[0] != "check":
        raise ConfigError(f"config {' '.join(words)!r}: give nothing, or `check FILE`")
    settings = load_config(shared.path_with_a_name(words[1]))
    with as_in_file(Path(words[1])):
        check_settings(settings)
    shared.say(f"{words[1]}: fine, {shared.counted(len(settings.stream), 'stream')}")


def doctor(
    *,
    model: shared.Model = "student",
    backend: shared.Backend = "onnxruntime",
    device: shared.Device = "auto",
    hardware: shared.Hardware = None,
    strict: shared.Strict = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Say what this machine can do: versions, engines, decoding, a two-second benchmark.

    With --strict, exit with 5 where the backend or hardware that you name would not be what runs.
    """
    from dgiqa_stream.cli._settings import settle
    from dgiqa_stream.config import StreamConfig
    from dgiqa_stream.doctor import examine, shortfalls

    given = {
        "model.name": ("--model", model),
        "model.backend": ("--backend", backend),
        "model.device": ("--device", device),
        "model.strict": ("--strict", strict),
        "source.hardware": ("--hardware", hardware),
        "source.strict": ("--strict", strict),
    }
    shared.set_up_logging(shared.LogLevel.WARNING)
    settings, wording = settle(StreamConfig(), given)
    with wording.errors():
        found = examine(settings)
    if as_json:
        json.dump(found, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        for topic, facts in found.items():
            sys.stdout.write(f"{topic}\n")
            for name, value in facts.items():
                sys.stdout.write(f"  {name}: {value}\n")
    missing = shortfalls(found) if strict else []
    for line in missing:
        shared.complain(line)
    if missing:
        shared.leave(shared.BROKEN)


def keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", parser=shared.path_with_a_name)],
    name: Annotated[str, typer.Argument(metavar="NAME", help="server, or a client's name.")],
) -> None:
    """Make a CURVE key pair for an encrypted publisher (``server``) or one of its subscribers."""
    from dgiqa_stream.curve import make_keys

    make_keys(folder, name)
    shared.say(f"{folder}: wrote {name}.key (public) and {name}.key_secret (keep it to yourself)")
