"""OV-COCO: the 48 base and 17 novel categories of COCO that open-vocabulary detectors compare on.

The split is that of Bansal et al. (Zero-Shot Object Detection, arXiv 1804.04340), with the images
and the evaluation on both groups together of OVR-CNN (arXiv 2011.10678). COCO's other 15 categories
are not used. The measure that papers compare is AP50 of the novel categories.
"""

# In the order of COCO's ids.
BASE = (
    "person bicycle car motorcycle train truck boat bench bird horse sheep bear zebra giraffe "
    "backpack handbag suitcase frisbee skis kite surfboard bottle fork spoon bowl banana apple "
    "sandwich orange broccoli carrot pizza donut chair bed toilet tv laptop mouse remote microwave "
    "oven toaster refrigerator book clock vase toothbrush"
).split()
NOVEL = (
    "airplane bus cat dog cow elephant umbrella tie snowboard skateboard cup knife cake couch "
    "keyboard sink scissors"
).split()

BASE_GROUPS = dict.fromkeys(BASE, ("base",))
GROUPS = BASE_GROUPS | dict.fromkeys(NOVEL, ("novel",))
