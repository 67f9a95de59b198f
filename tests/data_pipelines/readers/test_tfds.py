import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.image_ops import UnreadableImage
from data_pipelines.readers.tfds import TfdsReader
from owl_det.errors import DataError

tfds = pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets")

pytestmark = pytest.mark.filterwarnings("ignore")  # of TensorFlow and its dependencies

NAMES = ["traffic_light", "cat", "dog"]


def encoded(height: int, width: int, file_format: str = "JPEG") -> io.BytesIO:
    buffer = io.BytesIO()
    Image.new("RGB" if file_format == "JPEG" else "L", (width, height)).save(buffer, file_format)
    buffer.seek(0)
    return buffer


def objects(count: int, label: int = 0) -> list[dict]:
    return [
        {
            "bbox": tfds.features.BBox(0.1, 0.2, 0.5, 0.6),
            "label": (label + i) % 3,
            "is_crowd": i == 1,
            "segmentation": encoded(20, 30, "PNG"),
        }
        for i in range(count)
    ]


class OwlTiny(tfds.core.GeneratorBasedBuilder):
    """Three images with 0, 1 and 2 objects; the last split has a broken image and box."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("plain", "federated")]

    def _info(self):
        label = tfds.features.ClassLabel(names=NAMES)
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(
                {
                    "bbox": tfds.features.BBoxFeature(),
                    "label": label,
                    "is_crowd": np.bool_,
                    "segmentation": tfds.features.Image(shape=(None, None, 1)),
                }
            ),
        }
        if self.builder_config.name == "federated":
            features["neg_category_ids"] = tfds.features.Sequence(label)
            features["not_exhaustive_category_ids"] = tfds.features.Sequence(label)
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "damaged": self._damaged()}

    def _example(self, image_id, image, boxed):
        example = {"image": image, "image/id": image_id, "objects": boxed}
        if self.builder_config.name == "federated":
            example |= {"neg_category_ids": [2], "not_exhaustive_category_ids": [0]}
        return example

    def _generate_examples(self):
        for i in range(3):
            yield i, self._example(i + 70, encoded(20, 30), objects(i))

    def _damaged(self):
        yield 0, self._example(1, io.BytesIO(b"broken"), [])
        flat = objects(2)
        flat[0]["bbox"] = tfds.features.BBox(0.1, 0.2, 0.1, 0.6)
        yield 1, self._example(2, encoded(20, 30), flat)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    for config in ("plain", "federated"):
        builder = OwlTiny(config=config, data_dir=path, file_format="array_record")
        builder.download_and_prepare()
    return path


def test_records(data_dir):
    reader = TfdsReader("owl_tiny/plain", "train", data_dir=data_dir)
    assert len(reader) == 3
    empty, _, two = (reader[i] for i in range(3))
    assert empty.image_id == 70 and empty.boxes_xyxy.shape == (0, 4) and empty.names == ()
    assert empty.negatives == ("traffic light", "cat", "dog")
    assert two.image == encoded(20, 30).getvalue()  # still encoded, byte for byte
    np.testing.assert_allclose(two.boxes_xyxy, [[6, 2, 18, 10]] * 2, rtol=1e-6)
    assert two.boxes_xyxy.dtype == np.float32
    assert two.names == (("traffic light",), ("cat",)) and two.negatives == ("dog",)
    np.testing.assert_array_equal(two.is_crowd, [False, True])
    frequency = {c.id: c.frequency for c in reader.categories}
    assert frequency == pytest.approx({0: 2, 1: 1, 2: 0.1})  # images; the last is in none


def test_slices_and_versions(data_dir):
    reader = TfdsReader("owl_tiny/plain", "train", data_dir=data_dir)
    part = TfdsReader("owl_tiny/plain", "train[1:]", data_dir=data_dir)
    assert len(part) == 2 and part[0].image_id == 71
    assert reader.version.startswith("tfds-") and reader.version != part.version
    again = TfdsReader("owl_tiny/plain", "train", data_dir=data_dir)
    assert again.version == reader.version


def test_federated(data_dir):
    reader = TfdsReader("owl_tiny/federated", "train", data_dir=data_dir)
    assert reader.categories[0].name == "traffic light"
    assert reader[1].names == (("traffic light",),)
    assert reader[1].negatives == ("dog",) and reader[1].not_exhaustive == ("traffic light",)


def test_damage(data_dir):
    reader = TfdsReader("owl_tiny/plain", "damaged", data_dir=data_dir)
    with pytest.raises(UnreadableImage, match=r"damaged\[0\]"):
        reader[0]
    for _ in range(2):  # a second reading is not counted again
        assert reader[1].names == (("cat",),)
        assert reader[1].negatives == ("dog",) and reader[1].not_exhaustive == ("traffic light",)
        assert reader.dropped_boxes == 1


def test_errors(data_dir, tmp_path):
    with pytest.raises(DataError, match=r"split 'val' cannot be read.*it has .*train"):
        TfdsReader("owl_tiny/plain", "val", data_dir=data_dir)
    with pytest.raises(DataError, match="neither a TFDS builder nor prepared below.*`builder`"):
        TfdsReader("no_such_builder", "train", data_dir=data_dir)
    with pytest.raises(DataError, match="tfds build voc/2007 .*--file_format=array_record"):
        TfdsReader("voc/2007", "train", data_dir=tmp_path)
    with pytest.raises(DataError, match="mnist: needs the features.*it has image, label"):
        TfdsReader("mnist", "train", data_dir=tmp_path)


def fake_records(builder, split, decoders=None, **_):
    """Random records with the builder's features, as its data source gives them.

    The random records of `mock_data` itself give the fields of `objects` different lengths.
    """
    assert split == "train" and "image" in decoders
    rng = np.random.default_rng(0)
    features = builder.info.features
    records = []
    for number in range(4):
        boxes = np.sort(rng.uniform(0, 1, (number, 2, 2)), axis=1).reshape(-1, 4)
        known = {"bbox": boxes.astype(np.float32), "label": rng.integers(0, 20, number)}
        inside = features["objects"].feature
        record = {
            "image": encoded(20, 30).getvalue(),
            "objects": {key: known.get(key, np.zeros(number)) for key in inside},
        }
        for key in set(features) - set(record):
            record[key] = rng.integers(20, 30, 3) if "category" in key else number + 100
        records.append(record)
    return records


@pytest.mark.parametrize(
    ("builder", "num_names", "first_id"),
    [("lvis", 1203, 100), ("coco/2017", 80, 100), ("voc/2007", 20, 1)],
)
def test_features_of_real_builders(builder, num_names, first_id, tmp_path):
    with tfds.testing.mock_data(as_data_source_fn=fake_records):
        reader = TfdsReader(builder, "train", data_dir=tmp_path)
        assert len(reader.categories) == num_names and len(reader) == 4
        for index in range(4):
            record = reader[index]
            assert record.image_id == first_id + index
            assert len(record.names) == len(record.boxes_xyxy) == len(record.is_crowd) == index
            assert record.boxes_xyxy.max(initial=0) <= 30
            present = {name for (name,) in record.names}
            if builder == "lvis":
                assert len(record.negatives) == len(record.not_exhaustive) == 3
                assert not any("_" in category.name for category in reader.categories)
            else:
                assert len(record.negatives) == num_names - len(present)
