"""Floor 6: the door: one sub-command for each verb. torch is imported only when a verb runs."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prunus.config import CompressConfig, overrides, resolve, settings
from prunus.errors import UserError
from prunus.flags import UNSEEDED, Verb, flags, given
from prunus.machine import VERSION, environment, keep_freed_memory
from prunus.progress import Advance, Tally
from prunus.recording.artefact import trouble
from prunus.recording.changes import FIRST, VERBS
from prunus.setting import ANYWHERE
from prunus.terminal import Terminal, calm_libraries, of_bench

if TYPE_CHECKING:
    from prunus.texts.calibration import Join

BUDGET = tuple(key for key, one in settings().items() if key.startswith("budget.") and one.flag)
RESUMABLE = ("compress", "pick", "bench", "recover", "score", "train", "reform", "search", "extract", "report")


class Door(click.Group):
    """Turns what the user can mend into one sentence and exit code 2, and an interruption into how to go on."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # as they are written below: in the order of use

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        terminal = Terminal(quiet="--quiet" in ctx.obj)
        os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports it: transformers has a bar for GGUF files
        try:
            with terminal.notes():
                return super().invoke(ctx)
        except UserError as error:
            terminal.error(str(error))
            ctx.exit(2)
        except KeyboardInterrupt:
            if ctx.invoked_subcommand in RESUMABLE:
                terminal.note("stopped; what is finished is kept. To go on:")
                terminal.command(shlex.join(["prunus", *ctx.obj]))
            else:
                terminal.note("stopped")
            ctx.exit(130)
        except (MemoryError, RuntimeError, OSError) as error:
            if not (message := _machine_trouble(error)):
                raise
            terminal.error(message)
            ctx.exit(2)


def _machine_trouble(error: BaseException) -> str:
    """What a person can do about a machine that is too small, or "" for everything else."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return (
            "not enough memory. Use --dtype bfloat16, fewer --samples, a shorter --length, or another --device; "
            "`prunus check MODEL` says what is needed"
        )
    reason = trouble(error)
    return f"{getattr(error, 'filename', None) or 'the output'}: {reason}" if reason else ""


@click.group(cls=Door, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(VERSION)
def app() -> None:
    """Prunus finds the smaller networks inside a pretrained language model.

    Start with `prunus compress demo --out runs/demo`.
    """
    keep_freed_memory()


def main() -> None:
    """The command `prunus`."""
    app(prog_name="prunus")


# ------------------------------------------------------------------------------------------------------------ verbs


@flags(*(key for key, one in settings().items() if one.flag))
@app.command(cls=Verb, short_help="MODEL to smaller checkpoints and a report; resumes.")
@click.argument("model", required=False)
@click.option("--out", metavar="RUN", required=True, help="directory of the run: new, empty, or the same run's")
def compress(model: str | None, out: str, **parameters: Any) -> None:
    """MODEL to a front of smaller checkpoints and a report; the same command again goes on where it stopped.

    MODEL is a hub id, a local directory, a .gguf file, or `demo`. With --train, also in several processes: torchrun
    --nproc-per-node N -m prunus compress
    """
    config = resolve(parameters["config"], given({**parameters, "model": model}))
    terminal = Terminal(parameters["quiet"])
    from prunus import pipeline

    calm_libraries()
    terminal.result(pipeline.compress(config, Path(out), terminal.progress()), parameters["json"])


@flags(
    "test_text",
    "test_length",
    "test_chunks",
    "revision",
    "trust_remote_code",
    "calibration.column",
    names={"test_text": "text", "test_length": "length", "test_chunks": "chunks"},
)
@app.command(cls=Verb, short_help="Perplexity, divergence, speed and tasks of a checkpoint.")
@click.argument("checkpoint")
@click.option("--against", metavar="MODEL", help="also the KL divergence to this model, the dense one usually")
@click.option("--join", type=click.Choice(["auto", "rows", "raw"]), default="auto", help="how lines become one text")
@click.option("--speed", is_flag=True, help="also tokens per second, against --against where it is given")
@click.option("--tasks", metavar="NAME ...", multiple=True, help="lm-eval tasks, or a suite: paper, shen7")
@click.option(
    "--tasks-path", metavar="DIR", help="task files of lm-eval, e.g. for local data; only these are read then"
)
@click.option(
    "--shots", metavar="N", type=click.IntRange(0), help="examples before each question, whatever a suite says"
)
@click.option("--limit", metavar="N", type=click.IntRange(1), help="questions of each task at most")
def evaluate(checkpoint: str, against: str | None, join: Join, speed: bool, **parameters: Any) -> None:
    """Perplexity of CHECKPOINT on a text, by the standard protocol (chunks of equal length, no overlap); tasks."""
    config = resolve(parameters["config"], {**given(parameters), "model": checkpoint})
    text = config.test_text
    if text is None and not parameters["tasks"]:
        raise UserError("nothing to evaluate on; give --text FILE, --tasks NAMES, or both")
    for flag, value in (("--against", against), ("--speed", speed)):
        if text is None and value:
            raise UserError(f"{flag} compares on a text, and none was given; give --text FILE too, or leave it out")
    if text is not None and not Path(text).is_file():
        raise UserError(f"no text file {text!r}; give --text FILE")
    terminal = Terminal(parameters["quiet"])
    from prunus.evaluation import evaluate
    from prunus.models.loading import load
    from prunus.tasks import asked_for, evaluate_tasks, manager_of

    if parameters["tasks"]:  # what cannot be asked is refused before anything is measured
        asked = asked_for(" ".join(parameters["tasks"]).replace(",", " ").split(), parameters["shots"])
        manager_of(asked, parameters["tasks_path"])
    calm_libraries()
    loaded = load(
        checkpoint,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        compress=False,
    )
    found: dict[str, Any] = {"checkpoint": checkpoint}
    if text is not None:
        dense = against and load(
            against,
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            compress=False,
        )
        with terminal.progress()("evaluation", config.test_chunks) as advance:
            found |= {"against_name": against} if against else {}
            found |= evaluate(
                loaded.model,
                loaded.tokenizer,
                text,
                length=config.test_length,
                chunks=config.test_chunks,
                against=dense.model if dense else None,
                join=join,
                column=config.calibration.column,
                directory=checkpoint if Path(checkpoint).exists() else None,
                speed=speed,
                progress=_steps(advance),
            )
    if parameters["tasks"]:
        with terminal.progress()("tasks", len(asked)) as advance:
            found |= evaluate_tasks(
                loaded.model, loaded.tokenizer, asked, path=parameters["tasks_path"], limit=parameters["limit"],
                seed=config.seed, advance=advance,
            )  # fmt: skip
    terminal.result(found, parameters["json"])


def _steps(advance: Advance) -> Tally:
    """A tally that tells a bar how many more are done."""
    seen = 0

    def scanned(done: int, total: int) -> None:
        nonlocal seen
        advance(done - seen)
        seen = done

    return scanned


@flags("revision", "trust_remote_code", "calibration.samples", "calibration.length", common=UNSEEDED)
@app.command(cls=Verb, short_help="Can MODEL be compressed, and does it fit this machine?")
@click.argument("model")
def check(model: str, **parameters: Any) -> None:
    """Can MODEL be compressed? Its family table, its dimensions, its parameters by part, the memory needed."""
    config = resolve(parameters["config"], {**given(parameters), "model": model})
    terminal = Terminal(parameters["quiet"])
    from prunus.inspection import inspect_model

    calm_libraries()
    terminal.result(inspect_model(config), parameters["json"])


@flags(
    "budget.runtime",
    "budget.quant",
    "budget.prompt",
    "budget.batch",
    "budget.generate",
    "revision",
    "trust_remote_code",
    common=UNSEEDED,
)
@app.command(cls=Verb, short_help="How long every width of MODEL takes on this device.")
@click.argument("model")
@click.option("--step", metavar="N", type=click.IntRange(1), help="neurons between two MLP widths that are measured")
@click.option("--again", is_flag=True, help="measure again, although the cache has this table")
@click.option("--picture", metavar="FILE", help="draw the stairs: FILE.png and FILE.svg")
def latency(model: str, step: int | None, again: bool, picture: str | None, **parameters: Any) -> None:
    """How long every width of MODEL takes on this device: the table that budgets in milliseconds go by.

    It is kept in the user's cache ($PRUNUS_CACHE), and measured again where device, threads, dtype, shapes, request or
    versions are others.
    """
    config = resolve(parameters["config"], {**given(parameters), "model": model})
    terminal = Terminal(parameters["quiet"])
    from prunus.inspection import inspect_latency

    calm_libraries()
    found = inspect_latency(config, step=step, again=again, picture=picture, progress=terminal.progress())
    terminal.result(found, parameters["json"])


@flags("revision", "trust_remote_code", common=UNSEEDED)
@app.command(cls=Verb, short_help="A checkpoint for llama.cpp, onnxruntime or vLLM.")
@click.argument("checkpoint")
@click.option(
    "--format", "form", type=click.Choice(["gguf", "onnx", "vllm"]), required=True,
    help="gguf: a file for llama.cpp, unmodified; onnx: a graph for onnxruntime; vllm: what vLLM's own classes load",
)  # fmt: skip
@click.option(
    "--quant", type=click.Choice(["f32", "f16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"]),
    help="type of the matrices in a GGUF file  [default: f16]",
)  # fmt: skip
@click.option("--out", metavar="PATH", help="by default beside the checkpoint: NAME-QUANT.gguf, NAME-onnx, NAME-vllm")
@click.option("--overwrite", is_flag=True, help="replace what an export wrote there before")
@click.option("--tokenizer", metavar="FILE.gguf", help="take the tokenizer from this file, as it stands there")
@click.option("--pre-tokenizer", metavar="NAME", help="llama.cpp's name for how words are split, if it is not known")
def export(checkpoint: str, form: str, out: str | None, **parameters: Any) -> None:
    """CHECKPOINT for another program, tried and compared with PyTorch before it is handed over.

    CHECKPOINT is a directory that Prunus wrote, or any model that `compress` takes.
    """
    config = resolve(parameters["config"], {**given(parameters), "model": checkpoint})
    terminal = Terminal(parameters["quiet"])
    from prunus.exporting.export import export

    calm_libraries()
    found = export(
        checkpoint,
        format=form,
        out=out,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        dtype=config.dtype,
        device=config.device,
        progress=terminal.progress(),
        **{name: parameters[name] for name in ("quant", "overwrite", "tokenizer", "pre_tokenizer")},
    )
    terminal.result(found, parameters["json"])
    for sentence in found["notes"]:
        terminal.note(sentence)


LEARNING = tuple(key for key, one in settings().items() if key.startswith("train.") and one.flag)
ONE_NETWORK = tuple(key for key in LEARNING if key.partition(".")[2] not in ("space", "strategy", "sampler", "teacher"))


@flags(*ONE_NETWORK, "revision", "trust_remote_code")
@app.command(cls=Verb, short_help="Train one checkpoint further, by distillation.")
@click.argument("checkpoint")
@click.option("--teacher", metavar="MODEL", help="the model to imitate: the one that CHECKPOINT was made from")
@click.option("--text", metavar="FILE", help="the same as --train, where it is plain text")
@click.option("--out", metavar="DIR", required=True, help="where the trained checkpoint goes")
def recover(checkpoint: str, teacher: str | None, text: str | None, out: str, **parameters: Any) -> None:
    """Train CHECKPOINT further, to imitate --teacher on the text or the answers of --train FILE.

    The same command again goes on where it stopped. Several processes: torchrun --nproc-per-node N -m prunus recover
    """
    flags = given(parameters)
    if text and flags.setdefault("train.data", text) != text:
        raise UserError(f"--text {text} and --train {flags['train.data']} name two training data; give one of them")
    config = resolve(parameters["config"], {**flags, "model": checkpoint})
    terminal = Terminal(parameters["quiet"])
    from prunus.training.recovery import recover

    calm_libraries()
    found = recover(config, teacher, out, terminal.progress())
    terminal.result({key: value for key, value in found.items() if key != "history"}, parameters["json"])


@flags("keep_of", *BUDGET, common=("device",), of_run=True, files=False)
@app.command(cls=Verb, short_help="One more checkpoint of a run: any budget, any point of a front.")
@click.argument("run")
@click.option("--keep", metavar="X", type=float, multiple=True, help="the share to keep")
@click.option("--point", metavar="N", type=int, help="instead of a share: a point of the run's front, by its number")
@click.option(
    "--refit", metavar="N", type=int, default=0, help="also a sequential pass over N calibration windows: minutes"
)
@click.option("--measure", is_flag=True, help="also measure it: divergence, speed, perplexity where the run has a text")
@click.option(
    "--out",
    metavar="CHECKPOINT",
    help="where it goes; by default into RUN/models, as pick-X, pick-speedup-X or pick-point-N",
)
@click.option("--model", metavar="MODEL", help="the run's model, if it has moved")
def pick(run: str, keep: tuple[float, ...], refit: int, **parameters: Any) -> None:
    """One more checkpoint of RUN, for any other budget or of a point of its front: in seconds, without a search.

    One of --keep, --speedup, --latency-ms, --tokens-per-second, --memory-mb, --point. A time is that of the run's
    request, unless --prompt and the like say otherwise; the table of another request is measured first, in minutes.
    """
    asked = overrides(None, given({**parameters, "keep": None, "model": None}))
    budget = {key.removeprefix("budget."): asked.pop(key) for key in BUDGET if key in asked}
    terminal = Terminal(parameters["quiet"])
    if len(keep) > 1:
        raise UserError(f"one pick at a time, given {len(keep)} shares; give one --keep")
    from prunus.picking import pick

    calm_libraries()
    found = pick(
        run,
        keep[0] if keep else None,
        refit=refit,
        budget=budget,
        progress=terminal.progress(),
        **asked,
        **{name: parameters[name] for name in ("point", "measure", "out", "model")},
    )
    terminal.result(found, parameters["json"])
    for sentence in found["notes"]:
        terminal.note(sentence)


@flags(
    *(key for key, one in settings().items() if one.flag and one.step == "calibrate" and key != "calibration.source"),
)
@app.command(cls=Verb, short_help="Rival methods and ours on the same model and tests.")
@click.argument("model", required=False)
@click.option("--list", "show", is_flag=True, help="every method, its paper and what it can serve; needs no MODEL")
@click.option(
    "--methods",
    metavar="NAME ...",
    multiple=True,
    help="names of --list; all (the default), or structured: those whose networks are smaller",
)
@click.option(
    "--keep", metavar="X ...", multiple=True, help="shares of the decoder blocks' parameters [default: .8 .5]"
)
@click.option("--calibration", metavar="SOURCE", multiple=True, help="as in compress; give it again for more rows")
@click.option("--text", metavar="FILE", multiple=True, help="test text; give it again for more columns")
@click.option(
    "--lengths",
    metavar="N[:WINDOWS] ...",
    multiple=True,
    help="windows that perplexity is taken in: tokens, and how many from the beginning [default: 2048:5 128:24]",
)
@click.option("--tasks", metavar="NAME ...", multiple=True, help="also these tasks of lm-eval")
@click.option("--tasks-path", metavar="DIR", help="take the tasks from the files in this directory only")
@click.option("--limit", metavar="N", type=click.IntRange(1), help="questions of each task at most")
@click.option("--speed/--no-speed", default=True, help="also the speed against the dense model, in the same process")
@click.option("--out", metavar="DIR", help="directory of the bench: new, empty, or the same bench's")
def bench(model: str | None, show: bool, out: str | None, **parameters: Any) -> None:
    """Rival methods and ours on the same MODEL, tokens and tests: one row for each method and share.

    The same command again computes only the rows that are not there; methods, shares and calibrations may be added.
    """
    from prunus.baselines.table import chosen, listed

    terminal = Terminal(parameters["quiet"])
    if show:
        terminal.result(listed(), parameters["json"])
        return
    typed = given({**parameters, "model": model, "keep": " ".join(parameters["keep"]) or None})
    asked = overrides(parameters["config"], typed)  # what stands in the file and in --set serves as flags do
    config = CompressConfig.from_dict(asked)
    if out is None:
        raise UserError("where shall the rows go? Give --out DIR")
    from prunus.baselines import bench

    windows = (f"{config.test_length}:{config.test_chunks}",) if {"test_length", "test_chunks"} & asked.keys() else ()
    plan = bench.Plan(
        methods=chosen(parameters["methods"] or (asked.get("method", "all"),)),
        keeps=config.keep if "keep" in asked else (0.8, 0.5),
        calibrations=parameters["calibration"] or (config.calibration.source,),
        texts=parameters["text"] or ((config.test_text,) if config.test_text else ()),
        lengths=bench.read_lengths(parameters["lengths"] or windows or ("2048:5", "128:24")),
        tasks=tuple(word for words in parameters["tasks"] for word in words.split(",")),
        task_path=parameters["tasks_path"],
        task_limit=parameters["limit"],
        speed=parameters["speed"],
    )
    calm_libraries()
    found = bench.run(config, plan, out, terminal.progress())
    terminal.result(found, parameters["json"], {"rows": of_bench(found["rows"]), "report": found["report"]})


STEPS = (
    "RUN is a directory that `prunus compress` was given as --out. Flags change this step of the run and all later "
    "ones; what is not given stays as it is in the run, whatever its default."
)


def _step(name: str, sentence: str) -> click.Command:
    """The sub-command of one step of an existing run."""
    own = (FIRST.get(name, name), name, *(step for step, verb in VERBS.items() if verb == name))
    keys = [key for key, one in settings().items() if one.flag and one.step in (*own, ANYWHERE)]

    @flags(*keys, common=("device",), of_run=True)
    @app.command(name, cls=Verb, short_help=sentence, help=f"{sentence}\n\n{STEPS}")
    @click.argument("run")
    @click.option("--again", is_flag=True, help="do the step again although it is done; later ones are deleted")
    def command(run: str, again: bool, **parameters: Any) -> None:
        asked = overrides(parameters["config"], given(parameters))
        terminal = Terminal(parameters["quiet"])
        from prunus import pipeline

        calm_libraries()
        found = pipeline.step(Path(run), name, asked, terminal.progress(), again=again)  # type: ignore[arg-type]
        terminal.result(found, parameters["json"])

    return command


_step("score", "How important each unit is: the first step after the calibration.")
_step("train", "The super-network, trained so that its sub-networks are good.")
_step("reform", "Errors and weights of every level of every sub-layer.")
_step("search", "The widths to keep, for every target; with --front, networks of all sizes.")
_step("extract", "The checkpoints of the networks that the search chose.")
_step("report", "Figures, pictures and report.md of a run.")


@app.command(cls=Verb)
@click.option("--json", metavar="FILE", help="write them as JSON; - for stdout")
def version(json: str | None) -> None:
    """Versions of Prunus and of what it stands on."""
    Terminal().result(environment(), json)
