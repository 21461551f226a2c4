"""COCO's files: captions and boxes in order, what is left out, what is refused."""

import json

import pytest

from nanollava.infra.io import InputError
from nanollava.teacher.coco import AnnotatedImage, read_coco

CAT_BOX = ("cat", [0.1, 0.1, 0.603, 1.0])


@pytest.fixture
def files(tmp_path):
    """files(captions, instances) writes both, with changes to small valid ones: their paths."""

    def write(captions={}, instances={}):
        captions = {
            "images": [{"id": 7, "file_name": "7.jpg", "width": 200, "height": 100},
                       {"id": 5, "file_name": "5.jpg", "width": 100, "height": 100}],
            "annotations": [{"id": 1, "image_id": 5, "caption": "A dog. "},
                            {"id": 2, "image_id": 7, "caption": "A\ncat."},
                            {"id": 3, "image_id": 7, "caption": "A cat sleeps."}],
            **captions}
        instances = {
            "images": [], "categories": [{"id": 1, "name": "cat"}],
            "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "iscrowd": 0,
                             "bbox": [20.0, 10.0, 100.5, 95.0]}],
            **instances}
        paths = tmp_path / "captions.json", tmp_path / "instances.json"
        for path, content in zip(paths, (captions, instances), strict=True):
            path.write_text(json.dumps(content))
        return paths

    return write


def caption_rows(*images, caption="A cat."):
    return [{"id": number, "image_id": image, "caption": caption}
            for number, image in enumerate(images)]


def test_images_keep_the_order_of_the_file_and_boxes_become_fractions(files):
    images, left_out = read_coco(*files())
    assert images == [AnnotatedImage("7", "7.jpg", ["A cat.", "A cat sleeps."], [CAT_BOX]),
                      AnnotatedImage("5", "5.jpg", ["A dog."], [])]
    assert not left_out


def test_without_instances_images_have_no_boxes(files):
    images, _ = read_coco(files()[0])
    assert [image.boxes for image in images] == [[], []]


@pytest.mark.parametrize("captions, instances, reason", [
    ({}, {"annotations": [{"image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1}]},
     "crowd annotations"),
    ({"annotations": caption_rows(7)}, {}, "images without captions"),
    ({"annotations": caption_rows(7, 5) + [{"id": 9, "image_id": 5, "caption": " "}]}, {},
     "empty captions"),
    ({"annotations": caption_rows(7, 5, 9)}, {}, "annotations of images that are not listed"),
    ({"images": [{"id": image, "file_name": "a.jpg", "width": 9, "height": 9}
                 for image in (7, 5, 7)]}, {}, "images with a repeated id"),
])
def test_what_is_left_out_is_counted(files, captions, instances, reason):
    _, left_out = read_coco(*files(captions, instances))
    assert left_out == {reason: 1}


def test_ids_of_annotations_do_not_matter(files):
    rows = [{"id": 0, "image_id": 7, "caption": caption} for caption in ("A cat.", "It sleeps.")]
    rows += [{"id": 0, "image_id": 5, "caption": "A dog."}, {"image_id": 5, "caption": "A dog."}]
    images, left_out = read_coco(files({"annotations": rows})[0])
    assert [image.captions for image in images] == [["A cat.", "It sleeps."], ["A dog.", "A dog."]]
    assert not left_out


def test_sizes_may_stand_in_either_file(files):
    paths = files({"images": [{"id": 7, "file_name": "7.jpg"}, {"id": 5, "file_name": "5.jpg"}]},
                  {"images": [{"id": 7, "width": 200, "height": 100}]})
    assert read_coco(*paths)[0][0].boxes == [CAT_BOX]


def box_row(bbox):
    return {"annotations": [{"image_id": 7, "category_id": 1, "bbox": bbox}]}


@pytest.mark.parametrize("captions, instances, message", [
    ({}, box_row([1, 2]), r"annotations\[0\].bbox must be a list of 4, not a list of 2"),
    ({}, box_row([1, 2, float("nan"), 3]), r"bbox\[2\] must be a finite number, not nan"),
    ({"annotations": [{"image_id": 7, "caption": None}]}, {},
     r"captions.json: annotations\[0\].caption must be a string, not null"),
    ({"images": None}, {}, "captions.json: images must be a list, not null"),
    ({"annotations": [{"image_id": 7}]}, {}, r"json: annotations\[0\] has no 'caption'"),
    ({}, {"categories": []}, r"instances.json: annotations\[0\] has the category 1, which is not"),
    ({"images": [{"id": 7, "file_name": "7.jpg"}]}, {},
     "image 7 has boxes, but no width and height"),
])
def test_malformed_file_is_refused_with_its_row(files, captions, instances, message):
    with pytest.raises(InputError, match=message):
        read_coco(*files(captions, instances))
