"""Operations and their gradients on plain arrays, under PyTorch's names and argument order."""

from fastconv.functional.conv import (
    conv,
    conv1d,
    conv2d,
    conv3d,
    conv_bias_grad,
    conv_input_grad,
    conv_transpose,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    conv_transpose_input_grad,
    conv_transpose_weight_grad,
    conv_weight_grad,
    linear,
    linear_input_grad,
    linear_weight_grad,
    prepare_conv,
)
