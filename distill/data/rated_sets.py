"""The rated sets that can be loaded, as they are published.

:data:`DATASETS` says of each what it is called, what its licence allows, where its labels are, on
which scale and in which direction they are, what its content is and how it is split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from distill.data import picture_datasets as pictures
from distill.data import video_datasets as videos
from distill.data.label_files import Label

Reader = Callable[[Path, Mapping[str, Path]], Iterator[Label]]


@dataclass(frozen=True, slots=True)
class Dataset:
    """One rated set as it is published."""

    title: str
    kind: Literal["picture", "video"]
    licence: str
    """What its release says, in short: read the release before you use it."""
    label_file: str
    worst: float
    """The label that becomes MOS 0; above ``best`` where a low label is a good picture."""
    best: float
    """The label that becomes MOS 1."""
    content: str
    """What makes two pictures one content."""
    split_rule: str
    media: tuple[str, ...]
    """Folders with the pictures or clips, relative to the set's own."""
    read: Reader
    beyond: float = 0.0
    """How far a label may lie outside worst..best; it is then taken as the end of the scale."""


_DRAWN = "80:10:10, drawn by content"
_OWN = "none: each is its own"

DATASETS: Mapping[str, Dataset] = MappingProxyType(
    {
        "biq2021": Dataset(
            title="BIQ2021 (Ahmed and Asif 2022), 12,000 pictures",
            kind="picture",
            licence="no licence file; the paper says free for use and benchmarking",
            label_file="Train (Images and MOS).csv, Test (Images and MOS).csv",
            worst=0.0,
            best=1.0,
            content=_OWN,
            split_rule="official test; a tenth of the official training part for validation",
            media=("Images",),
            read=pictures.biq2021,
        ),
        "koniq10k": Dataset(
            title="KonIQ-10k (Hosu et al. 2020), 10,073 pictures",
            kind="picture",
            licence="free for research; the pictures have their own Creative Commons licences",
            label_file="koniq10k_distributions_sets.csv",
            worst=1.0,
            best=100.0,
            content=_OWN,
            split_rule="official, column set",
            media=("1024x768", "512x384"),
            read=pictures.koniq10k,
        ),
        "kadid10k": Dataset(
            title="KADID-10k (Lin et al. 2019), 10,125 pictures of 81 references",
            kind="picture",
            licence="free for research; the references are under the Pixabay licence",
            label_file="dmos.csv",
            worst=1.0,
            best=5.0,
            content="ref_img",
            split_rule=_DRAWN,
            media=("images",),
            read=pictures.kadid10k,
        ),
        "tid2013": Dataset(
            title="TID2013 (Ponomarenko et al. 2015), 3,000 pictures of 25 references",
            kind="picture",
            licence="free for research, with citation",
            label_file="mos_with_names.txt, mos_std.txt",
            worst=0.0,
            best=9.0,
            content="reference number in the name",
            split_rule=_DRAWN,
            media=("distorted_images",),
            read=pictures.tid2013,
        ),
        "live": Dataset(
            title="LIVE release 2 (Sheikh et al. 2006), 779 pictures of 29 references",
            kind="picture",
            licence="copyright University of Texas; free with notice and citation",
            label_file="dmos_realigned.mat, refnames_all.mat",
            worst=100.0,
            best=0.0,
            content="refnames_all",
            split_rule=_DRAWN,
            media=tuple(pictures.LIVE_FOLDERS),
            read=pictures.live,
            beyond=20.0,  # realignment moved some DMOS below 0 and above 100
        ),
        "csiq": Dataset(
            title="CSIQ (Larson and Chandler 2010), 866 pictures of 30 references",
            kind="picture",
            licence="free for research, with citation",
            label_file="csiq.DMOS.xlsx, sheet all_by_image, or its export csiq.DMOS.csv",
            worst=1.0,
            best=0.0,
            content="image",
            split_rule=_DRAWN,
            media=("dst_imgs",),
            read=pictures.csiq,
        ),
        "live_challenge": Dataset(
            title="LIVE In the Wild Challenge (Ghadiyaram and Bovik 2016), 1,162 pictures",
            kind="picture",
            licence="copyright University of Texas; free with notice and citation",
            label_file="Data/AllImages_release.mat, AllMOS_release.mat, AllStdDev_release.mat",
            worst=0.0,
            best=100.0,
            content=_OWN,
            split_rule=_DRAWN,
            media=("Images",),
            read=pictures.live_challenge,
        ),
        "spaq": Dataset(
            title="SPAQ (Fang et al. 2020), 11,125 smartphone pictures",
            kind="picture",
            licence="educational and research purposes only",
            label_file="Annotations/MOS and Image attribute scores.xlsx, or its export as .csv",
            worst=0.0,
            best=100.0,
            content=_OWN,
            split_rule=_DRAWN,
            media=("TestImage",),
            read=pictures.spaq,
        ),
        "flive": Dataset(
            title="FLIVE, or PaQ-2-PiQ (Ying et al. 2020), 39,810 pictures",
            kind="picture",
            licence="copyright University of Texas; free with notice and citation",
            label_file="labels_image.csv, labels=640_padded.csv, labels>640.csv",
            worst=0.0,
            best=100.0,
            content=_OWN,
            split_rule="official: larger than 640 px is test, is_valid is validation",
            media=("database",),
            read=pictures.flive,
        ),
        "uhd_iqa": Dataset(
            title="UHD-IQA (Hosu et al. 2024), 6,073 pictures 3840 px wide",
            kind="picture",
            licence="free for research; the pictures are under the Pixabay licence",
            label_file="uhd-iqa-metadata.csv",
            worst=0.0,
            best=1.0,
            content=_OWN,
            split_rule="official, column set",
            media=("training", "validation", "test"),
            read=pictures.uhd_iqa,
        ),
        "konvid1k": Dataset(
            title="KoNViD-1k (Hosu et al. 2017), 1,200 clips",
            kind="video",
            licence="free for research; the clips have their own Creative Commons licences",
            label_file="KoNViD_1k_metadata/KoNViD_1k_mos.csv",
            worst=1.0,
            best=5.0,
            content=_OWN,
            split_rule=_DRAWN,
            media=("KoNViD_1k_videos",),
            read=videos.konvid1k,
        ),
        "live_vqc": Dataset(
            title="LIVE-VQC (Sinno and Bovik 2019), 585 clips",
            kind="video",
            licence="copyright University of Texas; free with notice and citation",
            label_file="data.mat",
            worst=0.0,
            best=100.0,
            content=_OWN,
            split_rule=_DRAWN,
            media=("Video",),
            read=videos.live_vqc,
        ),
        "youtube_ugc": Dataset(
            title="YouTube-UGC (Wang et al. 2019), about 1,500 clips",
            kind="video",
            licence="Creative Commons Attribution, clip by clip: see the release",
            label_file="original_videos_MOS_for_YouTube_UGC_dataset.xlsx, sheet MOS, or .csv",
            worst=1.0,
            best=5.0,
            content=_OWN,
            split_rule=_DRAWN,
            media=("original_videos_h264", "original_videos"),
            read=videos.youtube_ugc,
        ),
        "lsvq": Dataset(
            title="LSVQ (Ying et al. 2021), 38,811 clips",
            kind="video",
            licence="copyright University of Texas; free with notice and citation",
            label_file="labels_train_test.csv, labels_test_1080p.csv",
            worst=0.0,
            best=100.0,
            content=_OWN,
            split_rule="official test and test_1080p; a tenth of the training part for validation",
            media=(".",),
            read=videos.lsvq,
        ),
    }
)


def describe(name: str) -> str:
    """What :data:`DATASETS` says of a set, a line for each property."""
    dataset = DATASETS[name]
    hidden = ("read", "media")
    rows = [(f.name, getattr(dataset, f.name)) for f in dataclasses.fields(dataset)]
    return "\n".join(f"{key:11} {value}" for key, value in rows if key not in hidden)
