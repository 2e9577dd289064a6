//! Which layers are there, and when: counted on a model of a few linear layers.

use candle_core::{DType, Device, Tensor};

use super::{super::Placement, *};
use crate::nn::Linear;

/// Bytes of one layer.
const LAYER: u64 = 2 * 2 * 4;

/// A file of `blocks.N.linear.weight`, each the unit matrix times N + 1.
fn file(blocks: usize) -> &'static [u8] {
    let tensors = (0..blocks).map(|at| {
        let tensor =
            Tensor::eye(2, DType::F32, &Device::Cpu).and_then(|x| x * (at + 1) as f64).expect("a small tensor");
        (format!("blocks.{at}.linear.weight"), tensor)
    });
    safetensors::serialize(tensors, None).expect("the tensors are whole").leak()
}

struct Model {
    layers: Vec<Linear>,
    pager: Arc<Pager>,
}

impl Model {
    fn new(blocks: usize, paging: Paging, stage: &str, occupancy: &Arc<Occupancy>) -> Self {
        Self::resting(blocks, paging, Rest::File, (stage, occupancy))
    }

    fn resting(blocks: usize, paging: Paging, rest: Rest, (stage, occupancy): (&str, &Arc<Occupancy>)) -> Self {
        let pager = Pager::new(paging, rest, stage, occupancy);
        let placement = Placement { dtype: DType::F32, device: &Device::Cpu, pager: Arc::clone(&pager), scheme: None };
        let weights = Weights::open_bytes(file(blocks), "a test", placement).expect("the file is valid");
        let layer = |at| weights.pp("blocks").pp(at).pp("linear").linear(2, 2, false);
        let layers = (0..blocks).map(layer).collect::<Result<Vec<_>>>().expect("the shapes fit");
        assert!(weights.unused().is_empty());
        Self { layers, pager }
    }

    /// 1 times the factors of the layers in this order.
    fn run(&self, order: &[usize]) -> f32 {
        let mut x = Tensor::ones((1, 2), DType::F32, &Device::Cpu).expect("a small tensor");
        for at in order {
            x = self.layers[*at].forward(&x).expect("the shapes fit");
        }
        x.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("two values")[0]
    }
}

#[test]
fn nothing_is_read_before_it_is_used() {
    let model = Model::new(3, Paging::Whole, "denoise", &Arc::default());
    assert_eq!(model.pager.tally(), (0, 0, 0));
    assert_eq!(model.run(&[0, 2]), 3.0);
    assert_eq!(model.pager.tally(), (2, 2 * LAYER, 2 * LAYER));
}

#[test]
fn a_whole_component_stays_for_its_stage_and_goes_when_the_next_one_begins() {
    let occupancy = Arc::default();
    let encoder = Model::new(2, Paging::Whole, "text_encoder", &occupancy);
    let unet = Model::new(2, Paging::Whole, "denoise", &occupancy);
    let net = Model::new(2, Paging::Whole, "denoise", &occupancy);
    encoder.run(&[0, 1, 0, 1]);
    assert_eq!(encoder.pager.tally(), (2, 2 * LAYER, 2 * LAYER));
    for _ in 0..3 {
        net.run(&[0, 1]);
        unet.run(&[0, 1]);
    }
    assert_eq!(encoder.pager.tally().1, 0);
    assert_eq!((net.pager.tally(), unet.pager.tally()), ((2, 2 * LAYER, 2 * LAYER), (2, 2 * LAYER, 2 * LAYER)));
    occupancy.leave();
    assert_eq!((net.pager.tally().1, unet.pager.tally().1), (0, 0));
    assert_eq!(unet.run(&[0, 1]), 2.0);
}

#[test]
fn single_layers_come_for_each_computation_and_none_stays() {
    let model = Model::new(3, Paging::Layers, "denoise", &Arc::default());
    assert_eq!(model.run(&[0, 1, 2, 0, 1, 2]), 36.0);
    assert_eq!(model.pager.tally(), (6, 0, 0));
}

#[test]
fn groups_come_one_after_the_other() {
    let groups = Paging::Groups { blocks: 2, prefetch: false };
    let model = Model::new(6, groups, "denoise", &Arc::default());
    for _ in 0..2 {
        assert_eq!(model.run(&[0, 1, 2, 3, 4, 5]), 720.0);
    }
    let (builds, bytes, peak) = model.pager.tally();
    assert_eq!((builds, bytes, peak), (12, 2 * LAYER, 2 * LAYER));
}

#[test]
fn a_second_thread_brings_the_next_group_and_no_more() {
    let groups = Paging::Groups { blocks: 1, prefetch: true };
    let occupancy = Arc::default();
    let model = Model::new(6, groups, "denoise", &occupancy);
    for _ in 0..20 {
        assert_eq!(model.run(&[0, 1, 2, 3, 4, 5]), 720.0);
    }
    assert!(model.pager.tally().2 <= 2 * LAYER, "{:?}", model.pager.tally());
    occupancy.leave();
    // A thread that was on its way finds that nobody wants what it fetches.
    assert_eq!(model.pager.tally().1, 0);
}

#[test]
fn the_order_of_use_is_learned_and_not_that_of_making() {
    let groups = Paging::Groups { blocks: 1, prefetch: true };
    let model = Model::new(3, groups, "denoise", &Arc::default());
    let order = [2, 0, 1];
    model.run(&order);
    model.run(&order);
    assert_eq!(lock(&model.pager.state).following, HashMap::from([(2, 0), (0, 1), (1, 2)]));
    assert!(model.pager.tally().2 <= 2 * LAYER);
}

#[test]
fn tensors_that_rest_on_the_host_are_read_once() {
    let occupancy = Arc::default();
    let model = Model::resting(2, Paging::Layers, Rest::Host, ("denoise", &occupancy));
    assert_eq!(model.run(&[0, 1, 0, 1]), 4.0);
    let resting = Model::resting(2, Paging::Whole, Rest::Host, ("denoise", &occupancy));
    assert_eq!(resting.run(&[1]), 2.0);
    occupancy.leave();
    assert_eq!(resting.run(&[1]), 2.0);
}

#[test]
fn a_model_that_goes_takes_its_layers_with_it() {
    let occupancy = Arc::default();
    let model = Model::new(2, Paging::Whole, "denoise", &occupancy);
    model.run(&[0, 1]);
    let pager = Arc::downgrade(&model.pager);
    drop(model);
    assert!(pager.upgrade().is_none());
    occupancy.leave();
}

#[test]
fn blocks_are_found_behind_the_names_that_wrap_a_model() {
    for (path, blocks, group) in [
        ("transformer_blocks.7.attn.to_q", 1, "transformer_blocks.7"),
        ("transformer_blocks.7.attn.to_q", 4, "transformer_blocks.1"),
        ("down_blocks.2.attentions.1.transformer_blocks.3.attn1.to_q", 1, "down_blocks.2"),
        ("mid_block.resnets.0.conv1", 1, "mid_block"),
        ("time_embedding.linear_1", 1, "time_embedding"),
        ("text_model.encoder.layers.5.mlp.fc1", 1, "text_model.encoder.layers.5"),
        ("encoder.block.3.layer.0.SelfAttention.q", 1, "encoder.block.3"),
        ("decoder.up_blocks.2.resnets.1.conv1", 1, "decoder.up_blocks.2"),
        ("decoder.conv_in", 1, "decoder.conv_in"),
        ("mid_block.resnets.0.conv1", 0, "mid_block.resnets.0.conv1"),
        ("encoder", 1, "encoder"),
    ] {
        assert_eq!(group_key(path, blocks), group, "{path}");
    }
}

#[test]
fn a_missing_tensor_is_found_when_the_model_is_made() {
    let pager = Pager::new(Paging::Layers, Rest::File, "denoise", &Arc::default());
    let placement = Placement { dtype: DType::F32, device: &Device::Cpu, pager, scheme: None };
    let weights = Weights::open_bytes(file(1), "some/model.safetensors", placement).expect("the file is valid");
    let missing = weights.pp("blocks.1.linear").linear(2, 2, false).expect_err("there is one block").to_string();
    assert!(missing.contains("`blocks.1.linear.weight`") && missing.contains("some/model.safetensors"), "{missing}");
    let misshapen = weights.pp("blocks.0.linear").linear(3, 2, false).expect_err("another shape").to_string();
    assert!(misshapen.contains("[2, 2]"), "{misshapen}");
}
