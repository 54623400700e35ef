"""`ecos-client`: the client's program, for the machine where the private images are.

    ecos-client init DIR --data IMAGES      make a client: policy, ledger
    ecos-client serve DIR --mailbox URL     answer queries as they come
    ecos-client ledger DIR                  what was released so far
    ecos-client inspect FILE                any message, in words
    ecos-client evaluate DIR --model FILE   try a delivered model on the client's own test images
    ecos-client key FILE                    make a key to share with the cloud's side

It needs neither lightning nor wandb nor any pool.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from ecos_pl.client_policy import ClientPolicy

DEFAULTS = ClientPolicy()


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; the exit status: 0 done, 2 a mistake or a refusal, 130 Ctrl-C."""
    options = _parser().parse_args(argv)
    from ecos_pl.ledger import LedgerError
    from ecos_pl.message_store import MailboxError

    try:
        status: int = options.run(options)
    except (ValueError, LedgerError, MailboxError) as error:
        print(f"ecos-client: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return status


# --- the commands --------------------------------------------------------------------------------


def _init(options: argparse.Namespace) -> int:
    from ecos_pl.client_setup import set_up

    policy = ClientPolicy(
        max_epsilon=options.max_epsilon,
        delta=options.delta,
        min_noise_std=options.min_noise_std,
        min_noise_multiplier=options.min_noise_multiplier,
        max_sample_rate=options.max_sample_rate,
        max_queries=options.max_queries,
        max_clusters=options.max_clusters,
        max_per_person=options.max_per_person,
        confirm=options.confirm,
        adapted_encoders=not options.no_adapted_encoders,
    )
    encoder = None
    if options.encoder != "ask":
        from ecos_pl.encoder import EncoderSpec

        encoder = EncoderSpec(options.encoder, options.weights, options.image_size)
    for line in set_up(
        options.folder,
        options.data,
        policy,
        encoder=encoder,
        test=options.test,
        person_column=options.person_column,
    ):
        print(line)
    return 0


def _serve(options: argparse.Namespace) -> int:
    from ecos_pl.client_serve import Person, serve
    from ecos_pl.client_setup import open_client
    from ecos_pl.envelope import read_key_file
    from ecos_pl.remote_mailbox import ClientMailbox

    key = read_key_file(options.key_file) if options.key_file else None
    client = open_client(
        options.folder,
        device=options.device,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    has_terminal = sys.stdin.isatty()
    if client.policy.confirm and not has_terminal:
        raise ValueError("the policy says confirm: true, and no terminal is there to say yes at")
    mailbox = ClientMailbox(options.mailbox, sender=options.sender, key=key)
    stop = threading.Event()

    def ask(question: str) -> bool:
        try:
            return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            return False

    def on_signal(number: int, frame: object) -> None:
        stop.set()  # the answer in progress is finished first; a second signal ends at once
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    print(f"answering queries at\n  {mailbox.shown}\nCtrl-C stops", flush=True)
    person = Person(lambda line: print(line, flush=True), ask if has_terminal else None)
    serve(
        client,
        mailbox,
        person,
        once=options.once,
        poll_s=options.poll_seconds,
        adapted_s=options.adapted_seconds,
        signed=key is not None,
        stop=stop,
    )
    print("stopped")
    return 0


def _ledger(options: argparse.Namespace) -> int:
    from ecos_pl.client_report import ledger_lines
    from ecos_pl.client_setup import open_ledger

    ledger, policy = open_ledger(options.folder)
    for line in ledger_lines(ledger, policy):
        print(line)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from ecos_pl.client_report import message_lines

    for file in options.files:
        for line in message_lines(file):
            print(line)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from ecos_pl.client_data import ClientData
    from ecos_pl.client_report import evaluation_lines
    from ecos_pl.model_file import load_model

    source = ClientData.load(options.folder).open_test()
    for line in evaluation_lines(load_model(options.model), source):
        print(line)
    return 0


def _key(options: argparse.Namespace) -> int:
    from ecos_pl.envelope import new_key_file

    new_key_file(options.file)
    print(f"{options.file}: give a copy to the cloud's side by a way that you trust")
    return 0


# --- the options ---------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ecos-client",
        description="The client's side of ECOS: it answers questions about private images with "
        "differentially private numbers, counts what they reveal, and never sends an image.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    init = commands.add_parser("init", help="make a client: its policy file and its ledger")
    init.set_defaults(run=_init)
    init.add_argument("folder", type=Path, metavar="DIR", help="the client's folder, made here")
    init.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="IMAGES",
        help="a folder (CLASS/x.png, or flat where there are no classes), or a CSV file with the "
        "columns path and label",
    )
    init.add_argument("--test", type=Path, metavar="IMAGES", help="images to try models on")
    init.add_argument("--person-column", metavar="NAME", help="CSV column: whose image it is")
    _number(init, "max_per_person", int, "protect persons, with this many images each at most")
    _number(init, "max_epsilon", float, "limit on ε over everything ever released", default=2.0)
    _number(init, "delta", float, "δ of the guarantee, well below 1 / number of images")
    _number(init, "min_noise_std", float, "least noise on a count, in images")
    _number(init, "min_noise_multiplier", float, "least noise ÷ sensitivity of other releases")
    _number(init, "max_sample_rate", float, "largest chance that an image takes part")
    _number(init, "max_queries", int, "answers at most, ever", default=20)
    _number(init, "max_clusters", int, "centroids at most in one query")
    init.add_argument("--confirm", action="store_true", help="ask me before every answer")
    init.add_argument(
        "--encoder",
        default="tf_efficientnet_lite0",
        metavar="NAME",
        help="the public timm encoder to trust, or ask (default: %(default)s)",
    )
    init.add_argument("--weights", default="auto", help="its weights (default: %(default)s)")
    init.add_argument(
        "--no-adapted-encoders",
        action="store_true",
        help="refuse queries for an encoder that the cloud has trained further",
    )
    init.add_argument("--image-size", type=int, default=48, help="in pixels (default: %(default)s)")

    run = commands.add_parser("serve", help="answer queries as they come")
    run.set_defaults(run=_serve)
    _folder(run)
    run.add_argument(
        "--mailbox",
        required=True,
        metavar="URL",
        help="folder or bucket that both sides reach: a path, s3://…, gs://…, sftp://…",
    )
    run.add_argument("--once", action="store_true", help="answer what is there now, then end")
    run.add_argument("--key-file", type=Path, help="key shared with the cloud's side")
    run.add_argument("--sender", default="client", help="what to call this side")
    run.add_argument("--poll-seconds", type=_positive, default=2.0, help="between two looks")
    run.add_argument(
        "--adapted-seconds",
        type=_positive,
        default=30.0,
        help="queries for an encoder that the cloud has trained further are answered at multiples "
        "of this time: choose it longer than embedding all images takes, so that the time tells "
        "nothing of how many they are (default: 30)",
    )
    run.add_argument("--device", default="cpu", help="where images are embedded: cpu, cuda, mps")
    run.add_argument("--batch-size", type=int, default=256, help="images embedded at once")
    run.add_argument("--num-workers", type=int, default=0, help="processes that read images")

    ledger = commands.add_parser(
        "ledger", help="what was released, when, to whom, and what is left"
    )
    ledger.set_defaults(run=_ledger)
    _folder(ledger)

    inspect = commands.add_parser("inspect", help="any message, in words")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("files", type=Path, metavar="FILE", nargs="+")

    evaluate = commands.add_parser("evaluate", help="a delivered model on the client's test images")
    evaluate.set_defaults(run=_evaluate)
    _folder(evaluate)
    evaluate.add_argument("--model", type=Path, required=True, metavar="FILE")

    key = commands.add_parser("key", help="make a key to share with the cloud's side")
    key.set_defaults(run=_key)
    key.add_argument("file", type=Path, metavar="FILE")
    return parser


def _folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the client's folder")


def _number(
    parser: argparse.ArgumentParser,
    name: str,
    kind: type[int] | type[float],
    text: str,
    default: float | None = None,
) -> None:
    value = getattr(DEFAULTS, name) if default is None else default
    shown = "none" if value is None else f"{value:g}"
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        type=kind,
        default=value,
        metavar="N",
        help=f"{text} (default: {shown})",
    )


def _positive(text: str) -> float:
    value = float(text)
    if not 0.01 <= value <= 86400:
        raise argparse.ArgumentTypeError("must lie between 0.01 and 86400 seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
