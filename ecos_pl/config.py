"""Every option of a run, with its default, its range and its help line.

To add a part (say `task=distillation`): write its dataclass with a `name`, and list it in the
`part(...)` of its group in `Config`.
"""
# ruff: noqa: RUF009 - option() and part() return dataclasses.field(...)

import re
from dataclasses import dataclass, field

from ecos_pl.overrides import REQUIRED, Part, nested, option, part

_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")
_WEIGHTS = (
    "auto: the packaged ImageNet weights for tf_efficientnet_lite0, else timm's pretrained "
    "weights; or pretrained, random, or a weight file"
)
_WORKERS = "processes that read images; null: from the number of CPU cores"
_DEVICES = (
    lambda value: re.fullmatch(r"auto|-1|[1-9]\d*|(\d+,)+\d*", str(value)) is not None,
    "auto, a number of devices, -1 for all, or indices as in 0,1",
)
_DURATION = (
    lambda value: re.fullmatch(r"\d+:\d\d:\d\d:\d\d", value) is not None,
    "a duration DD:HH:MM:SS",
)
_SHARE = (
    lambda value: isinstance(value, int) or value <= 1,
    "a number of batches (10) or a share of them (0.1, at most 1.0)",
)


@dataclass
class MixedDigitsOptions(Part):
    """Shipped benchmark: handwritten digits hidden in a pool of other images."""

    name: str = "mixed_digits"


@dataclass
class MnistFashionOptions(Part):
    """All of MNIST and Fashion-MNIST as the pool, a client with other MNIST digits."""

    name: str = "mnist_fashion"
    root: str = option("data", "folder that holds torchvision's MNIST and FashionMNIST")


_ALLOW_PICKLE = "; pickles may hold programs, of which nothing but arrays and text is read"
_REST = (
    "what becomes of those training images of {} that are not the client's: pool, as its part in "
    "the client's domain, or unused"
)


@dataclass
class DomainNetOptions(Part):
    """DomainNet, 345 classes: half of one of six domains is the client's."""

    name: str = "domainnet"
    root: str = option(
        "data/DomainNet", "folder with clipart, infograph, painting, quickdraw, real and sketch"
    )


@dataclass
class DomainNet10Options(Part):
    """DomainNet's ten most frequent classes: half of one of six domains is the client's."""

    name: str = "domainnet10"
    root: str = option(
        "data/DomainNet", "folder with clipart, infograph, painting, quickdraw, real and sketch"
    )
    allow_pickle: bool = option(
        False, f"split as FedBN's DOMAIN_train.pkl and DOMAIN_test.pkl say{_ALLOW_PICKLE}"
    )


@dataclass
class Cifar10ImageNet32Options(Part):
    """A client with CIFAR-10, ImageNet at 32×32 as the pool."""

    name: str = "cifar10_imagenet32"
    root: str = option("data", "folder that holds torchvision's cifar-10-batches-py")
    imagenet_root: str = option(
        "data/imagenet32", "folder with train_data_batch_1.npz to train_data_batch_10.npz"
    )
    num_files: int = option(10, "the first so many of those ten files", minimum=1, maximum=10)
    rest: str = option("pool", _REST.format("CIFAR-10"), choices=("pool", "unused"))
    allow_pickle: bool = option(False, f"read the pickled packaging of ImageNet-32{_ALLOW_PICKLE}")
    download: bool = option(False, "let torchvision fetch CIFAR-10 where it is missing")


@dataclass
class CelebaUtkfaceOptions(Part):
    """A client with CelebA's faces, UTKFace and Tiny-ImageNet as the pool."""

    name: str = "celeba_utkface"
    root: str = option("data", "folder that holds celeba, UTKFace and tiny-imagenet-200")
    target: str = option(
        "Male", "CelebA's attribute to tell apart; UTKFace's labels know Male alone"
    )
    rest: str = option("unused", _REST.format("CelebA"), choices=("pool", "unused"))
    tiny_imagenet: bool | None = option(
        None, "Tiny-ImageNet as an irrelevant part of the pool; null: where it is there"
    )


@dataclass
class Digits5Options(Part):
    """MNIST, SVHN, USPS, SynthDigits and MNIST-M: one domain is the client's, see client.domain."""

    name: str = "digits5"
    root: str = option("data", "folder of the data sets: docs/datasets.md")
    domains: list[str] = option(
        ["mnist", "svhn", "usps", "synth_digits", "mnist_m"], "which domains, as in [mnist,usps]"
    )
    max_per_domain: int | None = option(
        None, "training images of each domain at most, at random; null: all (679,000)", minimum=1
    )
    download: bool = option(False, "fetch what is missing of MNIST, SVHN and USPS")
    allow_pickle: bool = option(
        False, "read FedBN's partitions/train_part*.pkl: pickles can hide programs"
    )


@dataclass
class FolderOptions(Part):
    """Your own images, in folders."""

    name: str = "folder"
    pool: str = option(
        REQUIRED,
        "the public pool: a folder of images; tar shards, as in shards/{000..199}.tar; "
        "torchvision:NAME; hf:FOLDER; or a .yaml file that lists several of them",
    )
    licence: str | None = option(None, "the pool's licence, kept in the manifest, as in CC-BY-4.0")
    embeddings: str | None = option(
        None,
        "embeddings of the pool made elsewhere by the same encoder: a file or folder of .npy, "
        ".npz, .safetensors or .parquet with ids; null: the encoder runs here",
    )
    client: str | None = option(
        None,
        "the client's images, for a simulation: a folder with train and test, torchvision:NAME or "
        "hf:FOLDER; none with client=mailbox",
    )
    classes: list[str] = option(
        [], "the client's class names, as in [cat,dog], where its images are not here"
    )
    client_domain: str | None = option(
        None, "domain folder of the pool that the client's images come from, for evaluation only"
    )


@dataclass
class SimulatedClientOptions(Part):
    """A client in this process, from the data's own client images: for benchmarks."""

    name: str = "simulated"
    domain: str | None = option(
        None, "domain that the client's images come from, in data of several; null: the data's own"
    )
    fraction: float | None = option(
        None,
        "share of the domain's images, or of the data's client images, that the client has; null: "
        "as the data say",
        above=0,
        maximum=1,
    )
    size: int | None = option(
        None, "the client's training images, in place of client.fraction", minimum=1
    )
    classes: list[str] = option(
        [], "the only classes that the client has and the model tells apart, as in [0,1]; []: all"
    )
    imbalance: float | None = option(
        None,
        "Dirichlet concentration of the client's class shares, in training and test: 0.1 very "
        "unequal, 100 nearly equal; null: classes as they come",
        above=0,
    )
    seed: int = option(0, "of the draw of the client's images", minimum=0, maximum=2**32 - 1)


@dataclass
class MailboxOptions(Part):
    """A real client elsewhere, which runs ecos-client serve on the same mailbox."""

    name: str = "mailbox"
    url: str = option(
        REQUIRED, "folder or bucket that both sides reach: a path, s3://…, gs://…, sftp://…"
    )
    sender: str = option("train.py", "what to call this side; the client's ledger keeps it")
    key_file: str | None = option(
        None, "file with the key shared with the client, which signs all messages; null: unsigned"
    )
    deadline_hours: float | None = option(
        None, "give up waiting for an answer after this time; null: never", above=0
    )
    poll_seconds: float = option(
        60.0, "longest time between two looks into the mailbox", minimum=0.05
    )
    deliver: bool = option(
        True, "leave the trained model in the mailbox: ecos-client serve tries it on its own images"
    )


@dataclass
class EncoderOptions:
    """The public, frozen network that embeds pool and client images."""

    name: str = option("tf_efficientnet_lite0", "a timm model")
    weights: str = option("auto", _WEIGHTS)
    image_size: int = option(48, "side of the images it sees, in pixels", minimum=16)
    batch_size: int = option(
        256, "images embedded at once, on each device; on a CPU always 64", minimum=1
    )
    num_workers: int | None = option(None, _WORKERS, minimum=0)


@dataclass
class ProbeOptions:
    """What the client is asked about: the pool, compressed to centroids."""

    num_clusters: int | None = option(
        None,
        "centroids R the client is asked about; null: from pool size and noise",
        minimum=2,
    )
    num_dims: int = option(64, "principal components the centroids live in", minimum=1)
    num_iters: int = option(25, "k-means iterations at most", minimum=1)
    num_restarts: int = option(1, "k-means starts, of which the best counts", minimum=1)
    attempt: int = option(
        0, "another number asks the client anew, at its expense: after a lost answer", minimum=0
    )
    cache_dir: str | None = option(
        None, "folder for pool embeddings and clusters; null: run_root/cache"
    )


@dataclass
class PrivacyOptions:
    """What the client's answers may reveal."""

    noise_std: float = option(
        5.0,
        "noise asked for on each coverage count, standard deviation in images; the client's policy "
        "may want more",
        minimum=0.5,
        maximum=1_000_000,
    )
    sample_rate: float = option(
        1.0,
        "chance that a client image takes part in an answer (Poisson)",
        above=0,
        maximum=1,
    )
    delta: float = option(
        1e-5, "delta of the (epsilon, delta) guarantee, a probability", above=0, below=1
    )
    max_epsilon: float = option(
        1.0,
        "total epsilon that this run may spend, labels included; the label release gets what "
        "the coverage counts leave",
        above=0,
    )


@dataclass
class SelectionOptions:
    """Which pool images become the proxy set."""

    strategy: str = option(
        "ecos",
        "ecos: where the client's images lie; random: uniformly; all: the whole pool; "
        "cluster_uniform: equally many from each cluster; k_center: far apart; oracle: at random "
        "from the client's own domain, which only a simulation knows; not private, for "
        "client=simulated alone, since they read the client's images: mak: near them and diverse; "
        "nearest: the nearest to each of them",
        choices=(
            *("ecos", "random", "all", "oracle"),
            *("cluster_uniform", "k_center", "mak", "nearest"),
        ),
    )
    size: int = option(1500, "images in the proxy set; ignored by all", minimum=1)
    candidates_per_pick: float | None = option(
        None,
        "ecos takes the diverse ones of so many times the images it needs, drawn at random from "
        "where the client's are: nearer 1 the kinds of images keep their shares, larger prefers "
        "kinds that vary much; null: of all images there",
        minimum=1,
    )
    duplicate_distance: float = option(
        0.12,
        "of two chosen images whose embeddings (unit vectors) lie closer than this, one is "
        "replaced; 0: all stay",
        minimum=0,
        maximum=2,
    )


_ASCENDING = (
    lambda value: list(value) == sorted(set(value)) and all(epoch > 0 for epoch in value),
    "a list of epochs above 0, ascending",
)
_NUM_DIMS = "dimensions of the space in which the client is asked"
_NUM_VIEWS = (
    "random views per image that show which directions tell nothing of the class; 0: plain "
    "principal components"
)
_LABEL_FEATURES = (
    "encoder features the space is made of: grid keeps a coarse layout of an earlier layer, "
    "final pools the last one"
)


@dataclass
class ClientPrototypesOptions(Part):
    """Labels from noisy class means that the client releases."""

    name: str = "client_prototypes"
    features: str = option("grid", _LABEL_FEATURES, choices=("grid", "final"))
    num_dims: int = option(32, _NUM_DIMS, minimum=1)
    num_views: int = option(4, _NUM_VIEWS, minimum=0)
    noise_multiplier: float | None = option(
        None,
        "noise standard deviation ÷ sensitivity of the label release; null: calibrated to "
        "privacy.max_epsilon",
        above=0,
    )
    rounds: list[int] = option(
        [],
        "epochs before which the client is asked once more, in the space of the backbone as "
        "trained so far, as in [3]; all releases are equally noisy and fit in privacy.max_epsilon",
        rule=_ASCENDING,
    )
    round_features: str = option(
        "grid", "features of the trained backbone in those rounds", choices=("grid", "final")
    )
    round_num_dims: int | None = option(
        None,
        "dimensions of the space in those rounds; null: as labels.num_dims",
        minimum=1,
    )


@dataclass
class ClientTableOptions(Part):
    """Labels from the client's noisy counts of each class in each of some clusters."""

    name: str = "client_table"
    features: str = option("grid", _LABEL_FEATURES, choices=("grid", "final"))
    num_clusters: int | None = option(
        None, "clusters of the proxy set that are asked about; null: five a class", minimum=2
    )
    num_dims: int = option(32, _NUM_DIMS, minimum=1)
    num_views: int = option(4, _NUM_VIEWS, minimum=0)
    noise_std: float | None = option(
        None,
        "noise on each count, standard deviation in images; null: calibrated to "
        "privacy.max_epsilon",
        minimum=0.5,
    )


@dataclass
class ClientKnnOptions(Part):
    """Labels from noisy votes of the client's nearest images, as in the paper (private kNN)."""

    name: str = "client_knn"
    features: str = option("grid", _LABEL_FEATURES, choices=("grid", "final"))
    num_queries: int | None = option(
        None, "points of the proxy set that are voted on; null: three a class", minimum=2
    )
    max_answers: int | None = option(
        None, "points answered at most, after a screening; null: all, unscreened", minimum=1
    )
    num_neighbors: int | None = option(
        None, "images that vote at each point; null: three times the noise", minimum=1
    )
    num_dims: int = option(32, _NUM_DIMS, minimum=1)
    num_views: int = option(4, _NUM_VIEWS, minimum=0)


@dataclass
class PublicLabelsOptions(Part):
    """Labels that the pool already carries."""

    name: str = "public"
    num_images: int | None = option(
        None,
        "images whose label is used, the first that labels=human would send out; the others are "
        "unlabelled training data; null: all",
        minimum=1,
    )


@dataclass
class HumanLabelsOptions(Part):
    """Labels from people: the run writes an annotation job, and goes on when they are back."""

    name: str = "human"
    num_images: int | None = option(
        None,
        "images of the proxy set to have labelled; the others are unlabelled training data; null: "
        "all",
        minimum=1,
    )
    batch_size: int = option(50, "images that an annotator labels in one go", minimum=1)
    annotators: int = option(1, "annotators per image, for the price estimate", minimum=1)
    price_per_label: float = option(
        0.05,
        "what one answer about one image costs, in your currency; ask your provider",
        minimum=0,
    )
    image_size: int | None = option(
        1024, "longest side of the images that annotators see, in pixels; null: any", minimum=16
    )
    returned: str | None = option(
        None,
        "label file (.csv, or .json from Label Studio) or a folder of them; null: those in the "
        "run's folder annotation",
    )


@dataclass
class NoLabelsOptions(Part):
    """No labels, and nothing asked for them: enough for a student who follows a teacher."""

    name: str = "none"


@dataclass
class SelfLabelingOptions(Part):
    """Train a classifier on the labelled proxy set, with unlabelled pool images if wanted."""

    name: str = "self_labeling"
    backbone: str = option("tf_efficientnet_lite0", "the timm model to train")
    weights: str = option("auto", _WEIGHTS)
    image_size: int = option(48, "side of the training images, in pixels", minimum=16)
    batch_size: int = option(64, "labelled images per step, on each device", minimum=1)
    learning_rate: float = option(
        1e-3, "highest learning rate; not scaled with the number of devices", above=0
    )
    weight_decay: float = option(1e-2, "decoupled weight decay", minimum=0)
    label_smoothing: float = option(
        0.1, "share of the target spread over all classes", minimum=0, below=1
    )
    ema_decay: float | None = option(
        0.99, "decay of the averaged weights per step; null: no averaging", minimum=0, below=1
    )
    augment: str = option(
        "affine",
        "crop shifts; affine turns, scales and shears too; …_flip also mirrors, not for digits "
        "or text",
        choices=("none", "crop", "crop_flip", "affine", "affine_flip"),
    )
    method: str | None = option(
        None,
        "supervised: the labelled images alone; fixmatch and flexmatch also learn from unlabelled "
        "images of the kept clusters; null: fixmatch with labels=human, else supervised",
        choices=("supervised", "fixmatch", "flexmatch"),
    )
    consistency_weight: float = option(
        1.0, "weight of the loss on unlabelled images; fixmatch and flexmatch", above=0
    )
    consistency_threshold: float = option(
        0.95,
        "confidence from which an unlabelled image counts, a probability; flexmatch begins below",
        minimum=0,
        maximum=1,
    )
    least_threshold: float = option(
        0.5,
        "confidence below which flexmatch lowers the threshold of no class; 0: as published, which "
        "needs long training",
        minimum=0,
        maximum=1,
    )
    pseudo_labels_from: str = option(
        "model",
        "whose predictions pseudo-labels are: the model's own, or those of its averaged weights "
        "(needs task.ema_decay); fixmatch and flexmatch",
        choices=("model", "average"),
    )
    distribution_alignment: bool = option(
        False,
        "move predictions on unlabelled images to the class frequencies of the proxy labels; "
        "fixmatch and flexmatch",
    )
    class_balance: float = option(
        0.0,
        "how far rare classes are learned as if they were frequent (logit adjustment); 0: as they "
        "come, 1: as if all were equally frequent",
        minimum=0,
    )
    freeze_backbone: bool = option(False, "train the head alone, on the weights' features")
    compile: bool = option(
        False, "compile training steps (torch.compile): slow at first, then faster on GPUs"
    )
    unlabeled_ratio: int = option(2, "unlabelled images per labelled one in a batch", minimum=1)
    val_fraction: float = option(
        0.1, "share of the proxy set held out to follow training", minimum=0, below=0.5
    )
    num_workers: int | None = option(None, _WORKERS, minimum=0)


@dataclass
class DistillationOptions(Part):
    """Train a small student to answer like a teacher on the proxy set; labels are not needed."""

    name: str = "distillation"
    backbone: str = option("lcnet_035", "the timm model to train: the student")
    weights: str = option("random", f"the student's; {_WEIGHTS}")
    image_size: int = option(32, "side of the student's images, in pixels", minimum=16)
    batch_size: int = option(64, "images per step, on each device", minimum=1)
    learning_rate: float = option(
        4e-3, "highest learning rate; not scaled with the number of devices", above=0
    )
    weight_decay: float = option(1e-2, "decoupled weight decay", minimum=0)
    temperature: float = option(
        2.0, "by which teacher's and student's scores are divided before they are compared", above=0
    )
    distillation_weight: float = option(
        1.0, "weight of the distillation loss, which has the temperature's square in it", minimum=0
    )
    label_weight: float = option(
        0.0,
        "weight of the cross-entropy on the labels of the proxy set, where it has any",
        minimum=0,
    )
    feature_weight: float = option(
        0.0,
        "weight of the distance between the teacher's last features and the student's, through a "
        "projector; 0: off",
        minimum=0,
    )
    ema_decay: float | None = option(
        0.99, "decay of the averaged weights per step; null: no averaging", minimum=0, below=1
    )
    augment: str = option(
        "affine",
        "crop shifts; affine turns, scales and shears too; …_flip also mirrors, not for digits "
        "or text; teacher and student see the same view",
        choices=("none", "crop", "crop_flip", "affine", "affine_flip"),
    )
    num_views: int | None = option(
        None,
        "fixed views of each image, on which the teacher is run once and its scores kept on disk; "
        "null: a new view each time, the teacher runs along (augment=none: always one)",
        minimum=1,
    )
    val_fraction: float = option(
        0.1, "share of the proxy set held out to follow training", minimum=0, below=0.5
    )
    num_workers: int | None = option(None, _WORKERS, minimum=0)
    compile: bool = option(False, "compile the student's training steps (torch.compile)")
    teacher: str = option(
        "public",
        "public: trained once on those pool images that the pool labels with the client's classes; "
        "timm: teacher_backbone with its own head; or the model.safetensors of an earlier run",
    )
    teacher_backbone: str = option("tf_efficientnet_lite0", "timm model of teacher=public or timm")
    teacher_weights: str = option("auto", f"of teacher=public (to start from) or timm; {_WEIGHTS}")
    teacher_image_size: int = option(
        48, "side of the images of teacher=public or timm, in pixels", minimum=16
    )
    teacher_steps: int = option(
        400, "optimizer steps that teacher=public is trained for", minimum=1
    )
    teacher_batch_size: int = option(64, "images per step of teacher=public", minimum=1)
    teacher_learning_rate: float = option(1e-3, "highest learning rate of teacher=public", above=0)


@dataclass
class TargetOptions:
    """How small or fast a compressed model must be: at most one of them; none: sparsity=0.75."""

    size_mb: float | None = option(None, "size of model.int8.onnx at most, in 10⁶ bytes", above=0)
    latency_ms: float | None = option(
        None,
        "time of one image in model.int8.onnx at most, in milliseconds: measured on this machine, "
        "one CPU thread",
        above=0,
    )
    macs: float | None = option(None, "multiply-adds of one image at most, as in 2e7", above=0)
    sparsity: float | None = option(
        None, "share of the parameters to remove; 0: quantise only", minimum=0, below=1
    )


@dataclass
class CompressionOptions(Part):
    """Prune a trained model on the proxy set, and quantise it to 8 bits; weights not averaged."""

    name: str = "compression"
    teacher: str = option(
        REQUIRED, "what is compressed, and followed: the model.safetensors of an earlier run"
    )
    weights: str | None = option(
        None,
        "another model.safetensors of the teacher's classes to start from, as of one adapted to "
        "the client; null: the teacher's",
    )
    target: TargetOptions = nested(TargetOptions)
    num_prunings: int = option(3, "steps in which channels are removed", minimum=1)
    epochs_between: int = option(
        2, "epochs from one pruning to the next; the first comes at the start", minimum=1
    )
    num_importance_images: int = option(
        512, "proxy images on which the importance of channels is measured", minimum=1
    )
    temperature: float = option(4.0, "temperature of the distillation from the teacher", above=0)
    label_weight: float = option(
        0.0, "weight of the proxy labels' cross-entropy beside the distillation", minimum=0
    )
    calibration: str = option(
        "best",
        "how ranges of activations follow from calibration images: all values, or 99.99% of them; "
        "best: whichever agrees most with the float model on held-out proxy images",
        choices=("best", "minmax", "percentile"),
    )
    num_calibration_images: int = option(
        256, "proxy images on which the 8-bit model is calibrated", minimum=1
    )
    tolerance: float = option(
        0.01,
        "share of held-out proxy images on which the 8-bit model may answer otherwise before its "
        "first and last layer stay in float",
        minimum=0,
        maximum=1,
    )
    batch_size: int = option(64, "images per step", minimum=1)
    learning_rate: float = option(1e-3, "highest learning rate", above=0)
    weight_decay: float = option(1e-2, "decoupled weight decay", minimum=0)
    augment: str = option(
        "affine",
        "crop shifts; affine turns, scales and shears too; …_flip also mirrors, not for digits "
        "or text",
        choices=("none", "crop", "crop_flip", "affine", "affine_flip"),
    )
    val_fraction: float = option(
        0.1, "share of the proxy set held out, which chooses the calibration", minimum=0, below=0.5
    )
    num_workers: int | None = option(None, _WORKERS, minimum=0)
    compile: bool = option(False, "compile training steps (torch.compile)")


@dataclass
class TrainerOptions:
    """How it is trained, and on what."""

    max_epochs: int = option(6, "passes over the proxy set; -1: no limit", minimum=-1)
    max_steps: int = option(-1, "optimizer steps at most; -1: no limit", minimum=-1)
    accelerator: str = option(
        "auto", "hardware to train on", choices=("auto", "cpu", "gpu", "cuda", "mps", "tpu")
    )
    devices: int | str = option(
        "auto", "number of devices, -1 for all, or indices as in 0,1", rule=_DEVICES
    )
    num_nodes: int = option(1, "machines", minimum=1)
    strategy: str = option("auto", "how devices share the work: auto, ddp, fsdp, …")
    sync_batchnorm: bool = option(
        False, "batch statistics over all devices' images instead of each one's own; GPUs only"
    )
    timeout_minutes: float | None = option(
        None, "how long devices wait for each other while training; null: 30", above=0
    )
    precision: str = option("32-true", "arithmetic of the training steps", choices=_PRECISIONS)
    gradient_clip_val: float | None = option(
        None, "gradient norm above which gradients are scaled down; null: never", minimum=0
    )
    accumulate_grad_batches: int = option(1, "batches per optimizer step", minimum=1)
    limit_train_batches: int | float = option(
        1.0, "training batches per epoch: a number (10) or a share (0.1)", minimum=0, rule=_SHARE
    )
    limit_val_batches: int | float = option(
        1.0, "validation batches: a number (10) or a share (0.1)", minimum=0, rule=_SHARE
    )
    limit_test_batches: int | float = option(
        1.0, "test batches: a number (10) or a share (0.1)", minimum=0, rule=_SHARE
    )
    check_val_every_n_epoch: int = option(1, "epochs between two validations", minimum=1)
    log_every_n_steps: int = option(10, "steps between two log lines", minimum=1)
    deterministic: bool = option(False, "same result every time, slower on a GPU")
    fast_dev_run: bool = option(False, "one batch of everything, no logs: does it run at all?")
    enable_progress_bar: bool = option(True, "show a progress bar")
    profiler: str | None = option(
        None, "report where the time goes", choices=("simple", "advanced", "pytorch")
    )
    max_time: str | None = option(None, "stop after this time, DD:HH:MM:SS", rule=_DURATION)


@dataclass
class CsvOptions(Part):
    """Metrics in a CSV file in the run folder."""

    name: str = "csv"


@dataclass
class WandbOptions(Part):
    """Metrics, figures and samples in Weights & Biases."""

    name: str = "wandb"
    project: str = option("ecos", "project the run is filed under")
    entity: str | None = option(None, "user or team; null: your W&B default")
    group: str | None = option(None, "group of runs, such as a sweep over seeds")
    tags: list[str] = option([], "labels on the run, as in [baseline,small]")
    mode: str = option(
        "online",
        "offline keeps the run on disk for `wandb sync`",
        choices=("online", "offline", "disabled"),
    )


@dataclass
class TensorboardOptions(Part):
    """Metrics, figures and samples for TensorBoard, in the run folder."""

    name: str = "tensorboard"


@dataclass
class NoLoggerOptions(Part):
    """No metrics kept."""

    name: str = "none"


@dataclass
class CallbacksOptions:
    """What is drawn and logged; each can be turned off, none changes what is trained."""

    log_config: bool = option(True, "the config, to the logger")
    sampling_statistics: bool = option(
        True, "counts, quotas, thresholds, distances; domains and classes of what was chosen"
    )
    coverage_figure: bool = option(True, "figures/coverage.png: noisy counts and quotas by cluster")
    chosen_images: bool = option(
        True, "figures/chosen.png: chosen images with labels, and a random sample"
    )
    rejected_images: bool = option(True, "figures/rejected.png: images that were not chosen")
    embedding_map: bool = option(
        True, "figures/embedding_map.png: a sample of the pool, by choice and by domain"
    )
    map_method: str = option(
        "pca",
        "how the map comes to two dimensions; umap takes up to a minute and the extra umap",
        choices=("pca", "umap"),
    )
    privacy_ledger: bool = option(True, "figures/privacy_ledger.png: epsilon after each release")
    communication: bool = option(True, "bytes down and up by kind of message")
    throughput: bool = option(True, "images per second and GPU memory as training goes on")
    proxy_quality: bool = option(
        True, "measures of the proxy set beside a random one, some seconds a probe"
    )
    training_curves: bool = option(True, "figures/training.png: loss and accuracy over the steps")
    confusion_matrix: bool = option(
        True, "figures/confusion_matrix.png and accuracy by class, in a simulation's test"
    )
    calibration: bool = option(
        True, "figures/calibration.png: confidence and accuracy, in a simulation's test"
    )
    artifacts: bool = option(True, "proxy set and model as W&B artifacts")
    report: bool = option(True, "report.html: the run on one page")


@dataclass
class Config:
    """One run."""

    seed: int = option(1, "of everything drawn on the cloud's side", minimum=0, maximum=2**32 - 1)
    run_id: str | None = option(
        None,
        "name of the run folder; default: made from the config, so the same config is the same run",
    )
    run_root: str = option("runs", "folder of all run folders")
    experiment: str | None = option(None, "a file configs/experiment/NAME.yaml to start from")
    train_on: str = option(
        "proxy_set",
        "client: train locally on the client's own images, no probe; a reference line for "
        "simulations",
        choices=("proxy_set", "client"),
    )
    data: Part = part(
        MixedDigitsOptions,
        MnistFashionOptions,
        Digits5Options,
        DomainNet10Options,
        DomainNetOptions,
        Cifar10ImageNet32Options,
        CelebaUtkfaceOptions,
        FolderOptions,
    )
    client: Part = part(SimulatedClientOptions, MailboxOptions)
    encoder: EncoderOptions = field(default_factory=EncoderOptions)
    probe: ProbeOptions = field(default_factory=ProbeOptions)
    privacy: PrivacyOptions = field(default_factory=PrivacyOptions)
    selection: SelectionOptions = field(default_factory=SelectionOptions)
    labels: Part = part(
        ClientPrototypesOptions,
        ClientTableOptions,
        ClientKnnOptions,
        HumanLabelsOptions,
        PublicLabelsOptions,
        NoLabelsOptions,
    )
    task: Part = part(SelfLabelingOptions, DistillationOptions, CompressionOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    logger: Part = part(CsvOptions, WandbOptions, TensorboardOptions, NoLoggerOptions)
    callbacks: CallbacksOptions = field(default_factory=CallbacksOptions)
