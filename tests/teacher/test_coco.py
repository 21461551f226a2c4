import json

import pytest

from nanollava.infra.io import InputError
from nanollava.teacher.coco import Picture, read_coco


@pytest.fixture
def files(tmp_path):
    """files(captions, instances) writes both, with changes to small whole ones, and gives their paths."""

    def write(captions={}, instances={}):
        captions = {
            "images": [{"id": 7, "file_name": "7.jpg", "width": 200, "height": 100},
                       {"id": 5, "file_name": "5.jpg", "width": 100, "height": 100}],
            "annotations": [{"id": 1, "image_id": 5, "caption": "A dog. "},
                            {"id": 2, "image_id": 7, "caption": "A\ncat."},
                            {"id": 3, "image_id": 7, "caption": "A cat sleeps."}], **captions}
        instances = {
            "images": [], "categories": [{"id": 1, "name": "cat"}],
            "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [20.0, 10.0, 100.5, 95.0],
                             "iscrowd": 0}],
            **instances}
        paths = tmp_path / "captions.json", tmp_path / "instances.json"
        for path, content in zip(paths, (captions, instances)):
            path.write_text(json.dumps(content))
        return paths

    return write


def test_pictures_come_in_the_order_of_the_file_with_their_captions_and_their_boxes_as_shares(files):
    pictures, left_out = read_coco(*files())
    assert pictures == [Picture("7", "7.jpg", ["A cat.", "A cat sleeps."], [("cat", [0.1, 0.1, 0.603, 1.0])]),
                        Picture("5", "5.jpg", ["A dog."], [])]
    assert not left_out


@pytest.mark.parametrize("captions, instances, why", [
    ({}, {"annotations": [{"image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1}]}, "crowds"),
    ({"annotations": [{"id": 1, "image_id": 7, "caption": "A cat."}]}, {}, "pictures without captions"),
    ({"annotations": [{"id": 1, "image_id": image, "caption": "A cat."} for image in (7,)]
                     + [{"id": 2, "image_id": 5, "caption": " "}]}, {}, "pictures without captions"),
    ({"annotations": [{"id": n, "image_id": image, "caption": "A cat."} for n, image in enumerate((7, 5, 9))]}, {},
     "annotations of pictures that are not listed"),
    ({"annotations": [{"id": 1, "image_id": image, "caption": "A cat."} for image in (7, 7)]
                     + [{"id": 2, "image_id": 5, "caption": "A dog."}]}, {}, "annotations with an id that came before"),
    ({"images": [{"id": image, "file_name": "a.jpg", "width": 9, "height": 9} for image in (7, 5, 7)]}, {},
     "pictures with an id that came before"),
])
def test_what_is_left_out_is_counted(files, captions, instances, why):
    _, left_out = read_coco(*files(captions, instances))
    assert left_out == {why: 1}


def test_sizes_may_stand_in_either_file(files):
    paths = files({"images": [{"id": 7, "file_name": "7.jpg"}, {"id": 5, "file_name": "5.jpg"}]},
                  {"images": [{"id": 7, "width": 200, "height": 100}]})
    assert read_coco(*paths)[0][0].boxes == [("cat", [0.1, 0.1, 0.603, 1.0])]


@pytest.mark.parametrize("captions, instances, image_error", [
    ({}, {"annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2]}]}, "bbox .1, 2. is not four numbers"),
    ({}, {"annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2, float("nan"), 3]}]}, "is not four numbers"),
    ({}, {"annotations": [{"image_id": 7, "category_id": 1, "bbox": None}]}, "row 0: bbox None cannot be right"),
    ({"annotations": [{"image_id": 7, "caption": None}]}, {}, "row 0: caption None cannot be right"),
    ({"images": None}, {}, "captions.json is no COCO file: it has no list of images"),
    ({"annotations": [{"image_id": 7}]}, {}, "captions.json, annotations row 0: it has no 'caption'"),
    ({}, {"categories": []}, "instances.json, annotations row 0: no category 1"),
    ({"images": [{"id": 7, "file_name": "7.jpg"}]}, {}, "image 7 has boxes, but no width and height"),
])
def test_a_file_that_is_not_cocos_is_told_with_its_row(files, captions, instances, image_error):
    with pytest.raises(InputError, match=image_error):
        read_coco(*files(captions, instances))
