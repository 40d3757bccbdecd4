"""EAM-Net for skin-lesion segmentation: the network, its data, training and evaluation."""
