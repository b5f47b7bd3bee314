//! From the graph's operators to ONNX's: one function per operator, named tensors in between.

use std::collections::HashSet;

use super::proto::{AttributeProto, AttributeType, DataType, NodeProto, TensorProto};
use super::{LABELS, Options};
use crate::error::{Error, Result};
use crate::graph::{Graph, Node, ParamId, ParamStore, Shape};
use crate::ops::cascade::Norm;
use crate::ops::{Act, Cascade, Op};

/// Nodes in an order of execution, and the constants they read.
pub(super) struct Body {
    pub nodes: Vec<NodeProto>,
    pub constants: Vec<TensorProto>,
}

/// Translates a graph that [`passes::for_inference`](crate::graph::passes::for_inference) has
/// folded. A node's output tensor carries the node's name.
///
/// # Errors
/// [`Error::Usage`] for a fixed size out of range, [`Error::Failed`] for an operator that
/// it does not leave in the graph.
pub(super) fn convert(graph: &Graph, params: &ParamStore, options: &Options) -> Result<Body> {
    let shapes = match options.size {
        Some((width, height)) => Some(graph.infer_shapes(1, height, width)?),
        None => None,
    };
    let mut writer = Writer {
        graph,
        params,
        shapes,
        opset: options.opset,
        nodes: Vec::new(),
        constants: Vec::new(),
        written: HashSet::new(),
    };
    for node in &graph.nodes {
        writer.node(node)?;
    }
    if options.argmax {
        let logits = graph.node(graph.logits).name.as_str();
        let attributes = vec![int("axis", 1), int("keepdims", 0)];
        writer.emit("ArgMax", &[logits], LABELS, attributes);
    }
    Ok(Body { nodes: writer.nodes, constants: writer.constants })
}

struct Writer<'a> {
    graph: &'a Graph,
    params: &'a ParamStore,
    /// Shapes of all nodes where the size is fixed.
    shapes: Option<Vec<Shape>>,
    opset: u32,
    nodes: Vec<NodeProto>,
    constants: Vec<TensorProto>,
    /// Names of the constants.
    written: HashSet<String>,
}

/// A convolution's window.
struct Window {
    side: i64,
    stride: usize,
    dilation: usize,
    groups: usize,
}

impl Window {
    const POINT: Window = Window { side: 1, stride: 1, dilation: 1, groups: 1 };

    /// Padding that gives ceil(size / stride) for odd and even sizes alike: that of a 3x3 window
    /// is its dilation, that of a point is 0.
    fn attributes(&self) -> Vec<AttributeProto> {
        let dilation = self.dilation as i64;
        vec![
            ints("dilations", [dilation; 2]),
            int("group", self.groups as i64),
            ints("kernel_shape", [self.side; 2]),
            ints("pads", [dilation * (self.side / 2); 4]),
            ints("strides", [self.stride as i64; 2]),
        ]
    }
}

impl<'a> Writer<'a> {
    fn node(&mut self, node: &'a Node) -> Result<()> {
        let graph = self.graph;
        let name = node.name.as_str();
        let inputs: Vec<&str> =
            node.inputs.iter().map(|&id| graph.node(id).name.as_str()).collect();
        match &node.op {
            Op::Input { .. } => {}
            Op::Conv3x3(conv) => {
                let window = Window { side: 3, stride: conv.stride, dilation: 1, groups: 1 };
                let weights = (conv.weight, conv.bias);
                self.convolution(name, &inputs, weights, &window, conv.act);
            }
            Op::Conv1x1(conv) => {
                let weights = (conv.weight, conv.bias);
                self.convolution(name, &inputs, weights, &Window::POINT, conv.act);
            }
            Op::Cascade(cascade) => self.cascade(name, inputs[0], cascade)?,
            Op::Activation(op) => self.activation(op.act, inputs[0], name),
            Op::Add => self.emit("Add", &inputs, name, vec![]),
            Op::Concat => self.emit("Concat", &inputs, name, vec![int("axis", 1)]),
            Op::GlobalAvgPool => self.emit("GlobalAveragePool", &inputs, name, vec![]),
            Op::ChannelMean => self.channel_mean(name, inputs[0]),
            Op::MeuFuse(_) => self.meu_fuse(name, node, &inputs),
            Op::Resize => self.resize(node, inputs[0], inputs[1], name),
            Op::BatchNorm(_) | Op::Subsample | Op::WeightedPool | Op::MeuScores(_) => {
                return Err(unexpected(name, &node.op));
            }
        }
        Ok(())
    }

    /// y = act(W x + b + residual); the residual is the second input.
    fn convolution(
        &mut self,
        name: &str,
        inputs: &[&str],
        (weight, bias): (ParamId, Option<ParamId>),
        window: &Window,
        act: Act,
    ) {
        let mut operands = vec![inputs[0].to_string(), self.parameter(weight)];
        operands.extend(bias.map(|bias| self.parameter(bias)));
        let operands: Vec<&str> = operands.iter().map(String::as_str).collect();
        let (convolved, sum) = (format!("{name}/conv"), format!("{name}/sum"));
        let has_act = act != Act::None;
        match inputs.get(1) {
            Some(residual) => {
                self.emit("Conv", &operands, &convolved, window.attributes());
                let target = if has_act { sum.as_str() } else { name };
                self.emit("Add", &[&convolved, residual], target, vec![]);
                if has_act {
                    self.activation(act, &sum, name);
                }
            }
            None => {
                let target = if has_act { convolved.as_str() } else { name };
                self.emit("Conv", &operands, target, window.attributes());
                if has_act {
                    self.activation(act, &convolved, name);
                }
            }
        }
    }

    /// y_i = ReLU(D_i(x_i + y_{i-1})) over consecutive subsets of the channels (paper, section
    /// 3.1).
    fn cascade(&mut self, name: &str, x: &str, cascade: &Cascade) -> Result<()> {
        let Norm::Folded(biases) = &cascade.norm else {
            return Err(Error::Failed(format!(
                "node {name}: expected folded batch norms, found batch statistics"
            )));
        };
        let branches = cascade.dilations.len();
        let part = |kind: &str, i: usize| format!("{name}/{i}/{kind}");
        let subsets: Vec<String> = match branches {
            1 => vec![x.to_string()],
            _ => {
                let sizes = format!("{name}/split");
                self.integers(&sizes, &vec![cascade.width() as i64; branches]);
                let subsets: Vec<String> = (0..branches).map(|i| part("subset", i)).collect();
                self.emit_many("Split", &[x, &sizes], &subsets, vec![int("axis", 1)]);
                subsets
            }
        };
        let outputs: Vec<String> = match branches {
            1 => vec![name.to_string()],
            _ => (0..branches).map(|i| part("out", i)).collect(),
        };
        for i in 0..branches {
            let mut source = subsets[i].clone();
            if cascade.addition && i > 0 {
                source = part("sum", i);
                self.emit("Add", &[&subsets[i], &outputs[i - 1]], &source, vec![]);
            }
            let window = Window {
                side: 3,
                stride: cascade.stride,
                dilation: cascade.dilations[i],
                groups: cascade.width(),
            };
            let (weight, bias) = (self.parameter(cascade.weights[i]), self.parameter(biases[i]));
            let convolved = part("conv", i);
            self.emit("Conv", &[&source, &weight, &bias], &convolved, window.attributes());
            self.activation(Act::Relu, &convolved, &outputs[i]);
        }
        if branches > 1 {
            let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
            self.emit("Concat", &outputs, name, vec![int("axis", 1)]);
        }
        Ok(())
    }

    fn channel_mean(&mut self, name: &str, x: &str) {
        // Operator set 18 made the axes an input.
        if self.opset < 18 {
            let attributes = vec![ints("axes", [1]), int("keepdims", 1)];
            self.emit("ReduceMean", &[x], name, attributes);
        } else {
            let axes = format!("{name}/axes");
            self.integers(&axes, &[1]);
            self.emit("ReduceMean", &[x, &axes], name, vec![int("keepdims", 1)]);
        }
    }

    /// l * ca + upsample(h) * sa (paper, section 3.2); inputs h, l, ca and, where there is one, sa.
    fn meu_fuse(&mut self, name: &str, node: &Node, inputs: &[&str]) {
        let (h, l, ca) = (inputs[0], inputs[1], inputs[2]);
        let part = |kind: &str| format!("{name}/{kind}");
        let (low, up, high) = (part("low"), part("up"), part("high"));
        self.emit("Mul", &[l, ca], &low, vec![]);
        self.resize(node, h, l, &up);
        let high = match inputs.get(3) {
            Some(sa) => {
                self.emit("Mul", &[&up, sa], &high, vec![]);
                high
            }
            None => up,
        };
        self.emit("Add", &[&low, &high], name, vec![]);
    }

    /// Bilinear, half-pixel centres, to the height and width of `like`: the constant ones where
    /// the size is fixed, else taken from its shape at run time.
    fn resize(&mut self, node: &Node, x: &str, like: &str, output: &str) {
        let part = |kind: &str| format!("{output}/{kind}");
        let (outer, inner, sizes) = (part("batch_channels"), part("height_width"), part("sizes"));
        self.emit("Shape", &[x], &outer, vec![int("start", 0), int("end", 2)]);
        // The second input of both operators that resize lends its size.
        let target = self.shapes.as_ref().map(|shapes| shapes[node.inputs[1].0]);
        match target {
            Some(shape) => self.integers(&inner, &[shape.h as i64, shape.w as i64]),
            None => self.emit("Shape", &[like], &inner, vec![int("start", 2), int("end", 4)]),
        }
        self.emit("Concat", &[&outer, &inner], &sizes, vec![int("axis", 0)]);
        let attributes =
            vec![string("coordinate_transformation_mode", "half_pixel"), string("mode", "linear")];
        // The second and third input, region and scales, are left out.
        self.emit("Resize", &[x, "", "", &sizes], output, attributes);
    }

    fn activation(&mut self, act: Act, x: &str, output: &str) {
        let kind = match act {
            Act::None => "Identity",
            Act::Relu => "Relu",
            Act::Sigmoid => "Sigmoid",
        };
        self.emit(kind, &[x], output, vec![]);
    }

    fn emit(&mut self, kind: &str, inputs: &[&str], output: &str, attrs: Vec<AttributeProto>) {
        self.emit_many(kind, inputs, &[output.to_string()], attrs);
    }

    fn emit_many(
        &mut self,
        kind: &str,
        inputs: &[&str],
        outputs: &[String],
        attribute: Vec<AttributeProto>,
    ) {
        self.nodes.push(NodeProto {
            input: inputs.iter().map(ToString::to_string).collect(),
            output: outputs.to_vec(),
            // A tensor is written once, so that it names its node too.
            name: format!("{}:{kind}", outputs[0]),
            op_type: kind.to_string(),
            attribute,
        });
    }

    /// Name of a parameter's constant, which is written when it is first asked for.
    fn parameter(&mut self, id: ParamId) -> String {
        let spec = &self.params.specs[id.0];
        if self.written.insert(spec.name.clone()) {
            let values = self.params.get(id).iter();
            self.constants.push(TensorProto {
                dims: spec.shape.iter().map(|&side| side as i64).collect(),
                data_type: DataType::Float.into(),
                name: spec.name.clone(),
                raw_data: Some(values.flat_map(|v| v.to_le_bytes()).collect()),
            });
        }
        spec.name.clone()
    }

    /// A constant vector of int64.
    fn integers(&mut self, name: &str, values: &[i64]) {
        self.constants.push(TensorProto {
            dims: vec![values.len() as i64],
            data_type: DataType::Int64.into(),
            name: name.to_string(),
            raw_data: Some(values.iter().flat_map(|v| v.to_le_bytes()).collect()),
        });
    }
}

fn unexpected(name: &str, op: &Op) -> Error {
    Error::Failed(format!(
        "node {name}: expected an operator of the plain inference graph, found {}",
        op.kind()
    ))
}

fn attribute(name: &str, kind: AttributeType) -> AttributeProto {
    AttributeProto { name: name.to_string(), r#type: kind.into(), ..Default::default() }
}

fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto { i: Some(value), ..attribute(name, AttributeType::Int) }
}

fn ints<const N: usize>(name: &str, values: [i64; N]) -> AttributeProto {
    AttributeProto { ints: values.to_vec(), ..attribute(name, AttributeType::Ints) }
}

fn string(name: &str, value: &str) -> AttributeProto {
    AttributeProto { s: Some(value.as_bytes().to_vec()), ..attribute(name, AttributeType::String) }
}
