"""The sections of a card, in Markdown: text from files is escaped wherever it comes in."""

from collections.abc import Iterator
from importlib.metadata import version

from treeify.models.saved_architecture import is_trusted
from treeify.report.results import LatencyTable, Result
from treeify.share import picture as pictures
from treeify.share.markdown import literal, plain, table
from treeify.share.subject import Subject

_MOST_CLASSES = 1000
_ORIGIN = (
    ("base model", "base model"),
    ("splits", "splits"),
    ("saved by", "saved by"),
    ("machine", "trained on"),
    ("versions", "trained with"),
    ("started", "training began"),
    ("commit", "commit of treeify"),
)
_PAPER = "Ruiz & Verbeek, Anytime Inference with Distilled Hierarchical Neural Ensembles, AAAI 2021"


def sections(subject: Subject) -> Iterator[str]:
    """Headings and paragraphs, in order; empty ones are left out."""
    yield f"# {plain(subject.name)}"
    yield _summary(subject)
    yield "## Accuracy and cost"
    yield _accuracy(subject.result)
    yield _picture(subject)
    yield "## Use"
    yield _use(subject)
    yield "## Images and classes"
    yield _images(subject)
    if subject.result.latencies:
        yield "## Speed"
        yield "\n\n".join(map(_speed, subject.result.latencies))
    yield "## Data"
    yield _data(subject)
    yield "## Licence"
    yield _licence(subject)
    yield "## Limits"
    yield "\n".join(f"- {line}" for line in _limits(subject))
    yield "## Where it comes from"
    yield _origin(subject)


def _summary(subject: Subject) -> str:
    sizes = subject.result.sizes
    base = "a network of its author's own"
    if subject.architecture is not None:
        base = literal(subject.architecture)
    text = (
        f"An image classifier that gives a first answer early, and better ones if there is time:"
        f" {base} as a tree of {counted(sizes[-1].leaves)} that share their early layers"
        f" ({plain(_PAPER)}), made by treeify {version('treeify')}. The first leaf takes"
        f" {sizes[0].macs:,} multiply-accumulates (MACs) an image, all of them {sizes[-1].macs:,};"
        " an answer is the mean over the leaves so far."
    )
    if subject.extras:
        listed = "; ".join(f"{literal(path)}: {what}" for path, what in subject.extras.items())
        text += f"\n\nAlso here: {listed}."
    return text


def _accuracy(result: Result) -> str:
    scores = {score.leaves: score for score in result.scores}
    headings = ["leaves", "MACs", "parameters"]
    if scores:
        headings += ["accuracy %", "NLL", "calibration error %"]
    rows = []
    for cost in result.sizes:
        row = [str(cost.leaves), f"{cost.macs:,}", f"{cost.parameters:,}"]
        if score := scores.get(cost.leaves):
            row += [f"{score.accuracy:.2f}", f"{score.nll:.4f}", f"{score.calibration_error:.2f}"]
        elif scores:
            row += ["", "", ""]
        rows.append(row)
    lines = [table(headings, rows)]
    if result.base is not None:
        lines.append(
            f"The base model alone has {result.base.macs:,} MACs and {result.base.parameters:,}"
            " parameters; its accuracy is not stated here."
        )
    if result.answers is not None:
        lines.append(
            f"Measured on this ensemble, data set {literal(result.data_set)}:"
            f" {plain(result.answers.split)}."
        )
    elif scores:
        lines.append("As training wrote them down after its last epoch, on the held-out images.")
    else:
        reason = result.missing.get("answers") or result.missing.get("training") or ""
        lines.append(f"Its accuracy was not measured. {plain(reason)}".strip())
    return "\n\n".join(lines)


def _picture(subject: Subject) -> str:
    picture = subject.picture
    if isinstance(picture, str):
        return plain(picture, 500)
    return f"![{plain(picture.title)}]({pictures.FILE})\n\n{plain(picture.description, 2000)}"


def _use(subject: Subject) -> str:
    source = f"hf-hub:{subject.repository}"
    arguments = [f'"{source}"']
    notes = []
    if subject.architecture is None:
        arguments.append("model=Net()")
        notes.append("`Net()` is the base model, which is not in this repository: ask its author.")
    elif not is_trusted(subject.architecture.name):
        arguments.append("trust=True")
        notes.append(
            f"`trust=True` imports and calls {literal(subject.architecture.name)}, which has to be"
            " installed. Nothing in this repository is run without it."
        )
    lines = [f"hne = treeify.load({', '.join(arguments)})"]
    is_known = subject.preparation is not None and subject.preparation.is_known
    if is_known:
        imports = ["from PIL import Image", "import treeify"]
        lines.append('images = hne.preparation(Image.open("photo.jpg"))[None]')
    else:
        imports = ["import torch", "import treeify"]
        shape = ", ".join(map(str, (1, *subject.example)))
        lines.append(f"images = torch.zeros({shape})  # yours, prepared as in training")
    lines += [
        "for answer in hne.anytime(images):  # better and better",
        "    print(answer.leaves, answer.logits.argmax(-1).tolist())",
        "",
        "print(hne.predict(images).softmax(-1).amax(-1))  # of all leaves",
        "print(hne.predict(images, confidence=0.9).leaves)  # as many as each image needs",
    ]
    code = "\n".join([*imports, "", *lines])
    command = f"treeify predict {source} photo.jpg --deadline 20ms" if is_known else ""
    blocks = [f"```python\n{code}\n```", *notes]
    if command:
        blocks.append(
            f"Or on the command line, after `pip install treeify`:\n\n```\n{command}\n```"
        )
    return "\n\n".join(blocks)


def _images(subject: Subject) -> str:
    preparation = subject.preparation
    if preparation is None or not preparation.is_known:
        shape = " x ".join(map(str, subject.example))
        lines = [f"Images are {shape}. How they were prepared in training is not known."]
    else:
        lines = [
            f"Images: {plain(preparation, 500)}; resized with {preparation.interpolation}"
            f" interpolation, crop mode {preparation.crop_mode}. `hne.preparation` does all of it."
        ]
    classes = None if preparation is None else preparation.classes
    if classes is None:
        lines.append("The names of the classes are not known.")
    else:
        listed = ", ".join(plain(name) for name in classes[:_MOST_CLASSES])
        more = len(classes) - _MOST_CLASSES
        listed += f" and {more:,} more" if more > 0 else ""
        lines.append(f"{len(classes):,} classes, in the order of the logits: {listed}.")
    return "\n\n".join(lines)


def _speed(latencies: LatencyTable) -> str:
    rows = [
        [str(row.stop), f"{1e3 * row.typical:.3g}", f"{1e3 * row.slow:.3g}"]
        for row in latencies.transitions
        if row.start == 0
    ]
    return (
        f"Milliseconds to an answer of so many leaves, {plain(latencies.situation)}; medians of"
        f" {latencies.repeats} rounds, and the 99th percentile:\n\n"
        + table(["leaves", "median", "slow"], rows)
        + "\n\nOther machines are measured by `treeify calibrate`."
    )


def _data(subject: Subject) -> str:
    result = subject.result
    if "data" not in result.origin:
        return "What it was trained on is not known: no run wrote it."
    text = f"Trained on the data set {literal(result.origin['data'])}"
    if "loss" in result.origin:
        text += (
            f" with the loss {literal(result.origin['loss'])}, seed {plain(result.origin['seed'])}"
        )
    text += f", {len(result.epochs)} epochs" if result.epochs else ""
    text += ", from random weights" if subject.is_from_scratch else ""
    return text + ". `recipe.yaml` says all of it, but for where files lay."


def _licence(subject: Subject) -> str:
    lines = []
    if subject.licence is None:
        lines.append(
            "Nobody said under which licence these weights may be used: ask whoever published them."
        )
    else:
        lines.append(f"{plain(subject.licence)}, as whoever published it says.")
    if subject.base_model is not None:
        lines.append(
            f"It began with the weights of {literal(subject.base_model)}, which have theirs."
        )
    return " ".join(lines)


def _limits(subject: Subject) -> Iterator[str]:
    result = subject.result
    if subject.base_model is None and not subject.is_from_scratch:
        yield "Which trained weights it began with, if any, is not stated."
    if result.answers is not None:
        images = len(result.answers.target)
        yield (
            f"Accuracy is that of {images:,} held-out images, one of which is {100 / images:.2g}"
            " points; other images may be answered worse."
        )
        if result.answers.skipped:
            yield f"{len(result.answers.skipped):,} images could not be read and were left out."
    if not result.latencies:
        yield "How long answers take was not measured: `treeify calibrate` does, on your machine."
    if result.parity:
        worst = max(result.parity.values())
        yield (
            "Every leaf was compared with the untouched base architecture: the largest deviation is"
            f" {worst:.2g} of the tolerance."
        )
    elif "parity" in result.missing:
        reason = plain(result.missing["parity"])
        yield f"Leaves were not compared with the base architecture: {reason}"


def _origin(subject: Subject) -> str:
    origin = subject.result.origin
    rows = [f"- {what}: {plain(origin[key], 500)}" for key, what in _ORIGIN if origin.get(key)]
    return "\n".join([*rows, f"- card: treeify {version('treeify')}"])


def counted(count: int) -> str:
    """So many leaves."""
    return "1 leaf" if count == 1 else f"{count} leaves"
