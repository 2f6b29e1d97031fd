//! A flat range of a tensor as boxes: what safetensors files and PyTorch's checkpoints can describe.
//!
//! A rank's piece of a parameter is a range of the flattened tensor and may begin and end inside a row. Cut at the
//! boundaries of rows (planes, ...) it is a few boxes, each still one range of the flattened tensor: at most
//! 2 * dimensions - 1, so three for a matrix: the end of a row, whole rows, the beginning of a row.

/// A part of a tensor: `sizes` elements from `offsets` on, in each dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorBox {
    pub offsets: Vec<usize>,
    pub sizes: Vec<usize>,
    /// First element in the flattened tensor.
    pub first: usize,
    pub len: usize,
}

/// Elements `first..first + len` of a tensor of `shape` as boxes, in their order. A tensor without elements is one box.
pub fn boxes(shape: &[usize], first: usize, len: usize) -> Vec<TensorBox> {
    if shape.contains(&0) || shape.is_empty() {
        return vec![TensorBox { offsets: vec![0; shape.len()], sizes: shape.to_vec(), first: 0, len }];
    }
    // Elements between neighbours of each dimension.
    let mut strides = vec![1; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d];
    }
    let mut result = Vec::new();
    let (mut at, end) = (first, first + len);
    while at < end {
        // The outermost dimension of which whole slices begin here; the last one's slices are single elements.
        let fits = |d: &usize| at % strides[*d] == 0 && end - at >= strides[*d];
        let d = (0..shape.len()).find(fits).unwrap_or(shape.len() - 1);
        let index = at / strides[d] % shape[d];
        let count = ((end - at) / strides[d]).min(shape[d] - index);
        let offsets = (0..shape.len()).map(|i| at / strides[i] % shape[i]).collect();
        let sizes = (0..shape.len()).map(|i| if i < d { 1 } else { shape[i] });
        let mut sizes: Vec<usize> = sizes.collect();
        sizes[d] = count;
        result.push(TensorBox { offsets, sizes, first: at, len: count * strides[d] });
        at += count * strides[d];
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_matrix_cut_inside_rows_is_three_boxes() {
        let parts: Vec<_> = boxes(&[4, 5], 3, 14).into_iter().map(|b| (b.offsets, b.sizes)).collect();
        assert_eq!(parts, [(vec![0, 3], vec![1, 2]), (vec![1, 0], vec![2, 5]), (vec![3, 0], vec![1, 2])]);
        assert_eq!(boxes(&[4, 5], 0, 20)[0].sizes, [4, 5]);
        assert_eq!(boxes(&[], 0, 1), [TensorBox { offsets: vec![], sizes: vec![], first: 0, len: 1 }]);
        assert_eq!(boxes(&[0, 3], 0, 0)[0].sizes, [0, 3]);
    }

    proptest! {
        /// Boxes are few, follow each other, and hold exactly the elements of their range.
        #[test]
        fn boxes_tile_the_range(shape in proptest::collection::vec(1usize..6, 1..5), a in 0usize..700, b in 0usize..700) {
            let numel: usize = shape.iter().product();
            let (first, end) = (a.min(b) % (numel + 1), a.max(b) % (numel + 1));
            let (first, end) = (first.min(end), first.max(end));
            let found = boxes(&shape, first, end - first);
            prop_assert!(found.len() < 2 * shape.len());
            let mut at = first;
            for part in &found {
                prop_assert_eq!(part.first, at);
                prop_assert_eq!(part.len, part.sizes.iter().product::<usize>());
                // Every element of the box by its indices, in row-major order, is the next of the range.
                for i in 0..part.len {
                    let (mut rest, mut flat, mut stride) = (i, 0, 1);
                    for d in (0..shape.len()).rev() {
                        let index = part.offsets[d] + rest % part.sizes[d];
                        prop_assert!(index < shape[d]);
                        flat += index * stride;
                        rest /= part.sizes[d];
                        stride *= shape[d];
                    }
                    prop_assert_eq!(flat, at + i);
                }
                at += part.len;
            }
            prop_assert_eq!(at, end);
        }
    }
}
