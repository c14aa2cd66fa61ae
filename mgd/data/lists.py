"""The public labelled / unlabelled lists of VOC and Cityscapes, and lists of one's own."""

import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath

import pooch

from mgd.errors import UserError, one_line, some
from mgd.files import write_text
from mgd.pictures import SUFFIXES
from mgd.sections import Partition

# Lists of CPS (Chen et al.) and PseudoSeg (Zou et al.) as the repository of CPS publishes them.
_BASE = "https://raw.githubusercontent.com/charlesCXK/TorchSemiSeg/5e0c29c02738728b6848a732817db15620a6e034/DATA"
_FOLDERS = {"voc": "pascal_voc/subset_train_aug", "cityscapes": "city/config_new/subset_train"}
_SHA256 = {
    "voc/pseudoseg_labeled_1-16.txt": "f9bb25964b8e110f8627a72ae8dac46e2434542d980c09d5ede2e71bc644d549",
    "voc/pseudoseg_labeled_1-2.txt": "6a7f49d09dce47787d2a4ada72119fea9a1c75f10048fdcb8e03b99cbd7d6da7",
    "voc/pseudoseg_labeled_1-4.txt": "49a153ad29a53e4af0d028b3c8daf7a41a68b91adb5a4cffed3112d7b2c64fd2",
    "voc/pseudoseg_labeled_1-8.txt": "059a72de4349da85987c6d67746b9cb4adf3aed4d4cd22e72c78fa2f2f75c3c5",
    "voc/pseudoseg_unlabeled_1-16.txt": "676a6bd82f285e2e65db5444c1983f999c8827918c25a92854bd9aa9e0a0c2e0",
    "voc/pseudoseg_unlabeled_1-2.txt": "a891dcb1f2e3d8168c15653fa639281a2e4826717ff7981c64c56af6abe07b29",
    "voc/pseudoseg_unlabeled_1-4.txt": "6d81e371b9623175180fa93001fff4403432153436b38d5b59a0eb586d1826ae",
    "voc/pseudoseg_unlabeled_1-8.txt": "1a2db3987cbf59c9b0f5df5371497e63d154caccdd664d04f16a081b611d934a",
    "voc/train_aug_labeled_1-16.txt": "7dada8ccc5eb6309b4b81e172dfc24f0d83ea72078675083778ca10487182748",
    "voc/train_aug_labeled_1-2.txt": "192132b4f645339dd143850359d4e27bb62ba3ce447553a07de23fbff4f0c8b9",
    "voc/train_aug_labeled_1-4.txt": "62c450787069b36d88ea7bb35895a808885720ae833bae8b9c81775731062ea1",
    "voc/train_aug_labeled_1-8.txt": "df63f50a798512c3befb5364052733bd8bc169f609e034e9f55b5853798ead10",
    "voc/train_aug_unlabeled_1-16.txt": "49b06340ca1534c3f15001ea9ce6d2815dd2ae1302390cfbdcfc0b004e17d960",
    "voc/train_aug_unlabeled_1-2.txt": "415761b09b2b58696eadbe27d4cf09e42c495d247723d2a3267a7537fa410107",
    "voc/train_aug_unlabeled_1-4.txt": "a84acda9b7087bb4595db3d023d9f546347dd7e937f4db5ce6a7146739983cb9",
    "voc/train_aug_unlabeled_1-8.txt": "b93006960bd751713dd8f5c14a148925077ba8deade79fa8591f715d7adb80e2",
    "cityscapes/train_aug_labeled_1-16.txt": "4f2712f22e53acdf6e359c5afc4b10fa06725ff1e54b36abcf5dafc759b4405b",
    "cityscapes/train_aug_labeled_1-2.txt": "79cc85ca788bdf79d71f560ec597e30057056a7457971c4e51198a93b9521921",
    "cityscapes/train_aug_labeled_1-4.txt": "1eff973e47da3c5988b07891589faf3a41feef582ea1deae0dc22fad2ec1aba7",
    "cityscapes/train_aug_labeled_1-8.txt": "beee3025dd198cee48047a1a9a131adbd859ab1bdb7dfbb45df3583409720ed7",
    "cityscapes/train_aug_unlabeled_1-16.txt": "24ce8d93af159137d1b2b589d3416c20e4cd3692e9a9d46b4c63c6c3e8787d4f",
    "cityscapes/train_aug_unlabeled_1-2.txt": "7ef43d3d25669adba9d8c20a83b7645cd9691b49eb9f8fd5b3a7f43dbef46be9",
    "cityscapes/train_aug_unlabeled_1-4.txt": "d0305130428ef901f6a0e4bbe71fcbade36a154cc9930ad2f8fb1889b75f42f5",
    "cityscapes/train_aug_unlabeled_1-8.txt": "0a3f81fc4a193ab5bfa641f944fbc48c1b421d758e55b2daa3c2b8176cee072a",
}


def public_lists(section: Partition, data_name: str) -> tuple[list[str], list[str]]:
    """Return the labelled and unlabelled entries of a public partition.

    Args:
        section: `protocol` cps or pseudoseg, `labeled` a fraction, `root` a folder or None.
        data_name: the data set, voc or cityscapes.

    Raises:
        UserError: no such list, it cannot be had, or its content is not the published one.
    """
    prefix = {"cps": "train_aug", "pseudoseg": "pseudoseg"}[section.protocol]
    share = str(section.labeled).replace("/", "-")
    return tuple(_entries(section, data_name, f"{prefix}_{kind}_{share}.txt") for kind in ("labeled", "unlabeled"))


def own_lists(section: Partition) -> tuple[list[str], list[str]]:
    """Return the entries of `labeled_list` and `unlabeled_list`.

    Raises:
        UserError: a file cannot be read.
    """
    return tuple(read_list(Path(path)) for path in (section.labeled_list, section.unlabeled_list))


def read_list(path: Path) -> list[str]:
    """Return the first tab-separated field of every line; ends of line may be CR LF or missing.

    Raises:
        UserError: the file cannot be read or is empty.
    """
    try:
        entries = _lines(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not entries:
        raise UserError(f"{path}: names no image")
    return entries


def check_ids(ids: Iterable[str]) -> None:
    """Check that `write_list` can write ids.

    Raises:
        UserError: some contain what a line cannot hold.
    """
    if wrong := [repr(name) for name in ids if _lines(name) != [name]]:
        raise UserError(f"the id {some(wrong)} cannot stand on a line of a list; rename the image")


def write_list(path: Path, ids: Sequence[str]) -> None:
    """Write a list that `read_list` reads as these ids.

    Raises:
        UserError: see `check_ids`; or the file cannot be written.
    """
    check_ids(ids)
    write_text(path, "".join(f"{name}\n" for name in ids))


def _lines(text: str) -> list[str]:
    return [entry for line in text.splitlines() if (entry := line.split("\t")[0].strip())]


def match(entries: list[str], known: Collection[str], what: str, held_out: Collection[str] = ()) -> list[str]:
    """Turn the entries of a list into ids of the data: as they stand, or by the longest end of a path.

    Args:
        entries: of the list.
        known: ids of the training images.
        what: names the list in messages.
        held_out: ids of the validation images.

    Raises:
        UserError: entries that no training image answers to, or that come twice, with the first ones.
    """
    known = set(known)
    ids = [_id_of(entry, known) for entry in entries]
    lost = [entry for entry, name in zip(entries, ids, strict=True) if name not in known]
    held_out = set(held_out)
    if kept := [name for entry in lost if (name := _id_of(entry, held_out)) in held_out]:
        raise UserError(
            f"{what}: {len(kept)} of {len(ids)} entries are validation images: {some(kept)}; take them off the list"
        )
    if lost:
        raise UserError(
            f"{what}: {len(lost)} of {len(ids)} entries are no training image of [data]: {some(lost)}; mend [data], "
            "or the list"
        )
    if len(set(ids)) < len(ids):
        twice = sorted({name for name in ids if ids.count(name) > 1})
        raise UserError(f"{what}: names {twice[0]} twice")
    return ids


def _id_of(entry: str, known: Collection[str]) -> str:
    path = PurePosixPath(entry)
    parts = path.with_suffix("").parts if path.suffix.lower() in SUFFIXES else path.parts
    ends = ["/".join(parts[start:]).removesuffix("_leftImg8bit") for start in range(len(parts))]
    composed = [unicodedata.normalize("NFC", end) for end in (entry, *ends)]  # as the ids of files are; not so on a Mac
    return next((end for end in (entry, *ends, *composed) if end in known), entry)


def _entries(section: Partition, data_name: str, file: str) -> list[str]:
    sha256 = _SHA256.get(f"{data_name}/{file}")
    if sha256 is None:
        having = sorted({key.partition("/")[0] for key in _SHA256 if key.endswith(file)})
        raise UserError(
            f"[partition] protocol = {section.protocol!r}: there is no public list for [data] {data_name!r}; "
            f'there is for {", ".join(having)}; use protocol = "random" or "files"'
        )
    if section.root is None:
        url = f"{_BASE}/{_FOLDERS[data_name]}/{file}"
        try:
            path = Path(pooch.retrieve(url, f"sha256:{sha256}", f"{data_name}-{file}", pooch.os_cache("mgd")))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{url} cannot be fetched ({one_line(error)}); fetch it by hand and name its folder in [partition] root"
            ) from error
        return read_list(path)
    folder = Path(section.root)
    path = next((p for p in (folder / data_name / file, folder / file) if p.is_file()), None)
    if path is None:
        raise UserError(f"[partition] root: neither {folder / data_name / file} nor {folder / file} exists")
    if pooch.file_hash(str(path)) != sha256:
        raise UserError(f'{path}: not the published list (its SHA-256 differs); for lists of your own use "files"')
    return read_list(path)
