//! A pickle machine that can rebuild tensors and nothing else.
//!
//! Pickle is a program. This machine runs the part of its instruction set that builds numbers, strings, tuples,
//! lists and dictionaries, and knows a closed list of names ([`Global`]). It imports nothing, calls nothing and
//! sets no attribute: an instruction or name outside the list ends the reading with an error that says which.
//!
//! Values live in one arena and refer to each other by number, so that neither cycles nor deep nesting in a
//! hostile file can exhaust the stack, and memory stays proportional to the file.

use std::collections::HashMap;

use crate::dtype::DType;

/// Number of a value in the arena.
pub(super) type Id = u32;

/// Longest pickle that is read: the tensors' bytes lie outside it, so real ones are far shorter.
pub(super) const MAX_LEN: usize = 64 << 20;

/// Most values that a pickle may build.
const MAX_VALUES: usize = 8 << 20;

/// A value.
#[derive(Debug, Clone)]
pub(super) enum Node {
    None,
    Bool(bool),
    Int(i64),
    Text(Box<str>),
    /// Floats, bytes and other leaves that no tensor needs.
    Opaque,
    Tuple(Box<[Id]>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Storage),
    Tensor(Box<Tensor>),
}

/// The names that a pickle may mention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildTensorV2,
    RebuildTensorV3,
    RebuildParameter,
    Size,
    Device,
    Storage(Option<DType>),
    Type(Option<DType>),
}

impl Global {
    fn find(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensorV2,
            ("torch._utils", "_rebuild_tensor_v3") => Self::RebuildTensorV3,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "Size") => Self::Size,
            ("torch", "device") => Self::Device,
            ("torch" | "torch.storage", "UntypedStorage") => Self::Storage(None),
            ("torch" | "torch.storage", _) if name.ends_with("Storage") => {
                Self::Storage(Some(storage_type(name)?))
            }
            ("torch", _) => Self::Type(torch_type(name)?),
            _ => return None,
        })
    }
}

fn storage_type(name: &str) -> Option<DType> {
    Some(match name {
        "DoubleStorage" => DType::F64,
        "FloatStorage" => DType::F32,
        "HalfStorage" => DType::F16,
        "BFloat16Storage" => DType::BF16,
        "LongStorage" => DType::I64,
        "IntStorage" => DType::I32,
        "ShortStorage" => DType::I16,
        "CharStorage" => DType::I8,
        "ByteStorage" => DType::U8,
        "BoolStorage" => DType::Bool,
        _ => return None,
    })
}

/// `torch.float32` and its like; the inner `None` is a type that a file may name but no tensor may have.
fn torch_type(name: &str) -> Option<Option<DType>> {
    Some(Some(match name {
        "float64" | "double" => DType::F64,
        "float32" | "float" => DType::F32,
        "float16" | "half" => DType::F16,
        "bfloat16" => DType::BF16,
        "float8_e4m3fn" => DType::F8E4M3,
        "float8_e5m2" => DType::F8E5M2,
        "int64" | "long" => DType::I64,
        "int32" | "int" => DType::I32,
        "int16" | "short" => DType::I16,
        "int8" => DType::I8,
        "uint64" => DType::U64,
        "uint32" => DType::U32,
        "uint16" => DType::U16,
        "uint8" => DType::U8,
        "bool" => DType::Bool,
        "complex64" | "complex128" => return Some(None),
        _ => return None,
    }))
}

/// A block of elements that lies elsewhere in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Storage {
    pub key: Box<str>,
    /// `None`: untyped, counted in bytes.
    pub dtype: Option<DType>,
    pub numel: u64,
}

/// A view of a storage, not yet checked against it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tensor {
    pub storage: Storage,
    pub dtype: DType,
    pub offset: u64,
    pub shape: Vec<u64>,
    pub strides: Vec<u64>,
}

/// What a pickle built.
#[derive(Debug)]
pub(super) struct Loaded {
    nodes: Vec<Node>,
    pub root: Id,
    /// Bytes up to and including STOP.
    pub consumed: usize,
}

impl Loaded {
    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[id as usize]
    }
}

/// Why a pickle was refused, and at which byte.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub offset: usize,
    pub reason: String,
}

type Step<T> = Result<T, String>;

/// Runs a pickle to its STOP.
pub(super) fn load(bytes: &[u8]) -> Result<Loaded, Refusal> {
    let mut machine = Machine {
        bytes: &bytes[..bytes.len().min(MAX_LEN)],
        at: 0,
        nodes: vec![Node::None, Node::Bool(false), Node::Bool(true), Node::Opaque],
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    loop {
        let offset = machine.at;
        match machine.step() {
            Ok(None) => {}
            Ok(Some(root)) => {
                return Ok(Loaded { nodes: machine.nodes, root, consumed: machine.at });
            }
            Err(reason) => return Err(Refusal { offset, reason }),
        }
    }
}

const NONE: Id = 0;
const FALSE: Id = 1;
const TRUE: Id = 2;
const OPAQUE: Id = 3;

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    /// Stack heights at the open marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    /// One instruction; `Some` is the result.
    fn step(&mut self) -> Step<Option<Id>> {
        let [opcode] = self.array()?;
        match opcode {
            // PROTO, FRAME
            0x80 => match self.array()? {
                [0..=5] => {}
                [version] => return Err(format!("protocol {version}; 0 to 5 exist")),
            },
            0x95 => drop(self.array::<8>()?),
            b'.' => return self.pop().map(Some),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'2' => {
                let top = self.peek()?;
                self.stack.push(top);
            }
            b'N' => self.stack.push(NONE),
            0x88 => self.stack.push(TRUE),
            0x89 => self.stack.push(FALSE),
            b'K' => {
                let [x] = self.array()?;
                self.push(Node::Int(x.into()))?;
            }
            b'M' => {
                let x = u16::from_le_bytes(self.array()?);
                self.push(Node::Int(x.into()))?;
            }
            b'J' => {
                let x = i32::from_le_bytes(self.array()?);
                self.push(Node::Int(x.into()))?;
            }
            0x8a => {
                let [len] = self.array()?;
                let node = long(self.take(len.into())?);
                self.push(node)?;
            }
            b'I' => match self.line()? {
                "00" => self.stack.push(FALSE),
                "01" => self.stack.push(TRUE),
                digits => {
                    let node = digits.parse().map_or(Node::Opaque, Node::Int);
                    self.push(node)?;
                }
            },
            b'L' => {
                let digits = self.line()?.trim_end_matches('L');
                let node = digits.parse().map_or(Node::Opaque, Node::Int);
                self.push(node)?;
            }
            b'F' => {
                self.line()?;
                self.stack.push(OPAQUE);
            }
            b'G' => {
                self.array::<8>()?;
                self.stack.push(OPAQUE);
            }
            // Text: SHORT_BINUNICODE, BINUNICODE, BINUNICODE8, and Python 2's byte strings.
            0x8c | b'U' => {
                let [len] = self.array()?;
                self.text(len.into())?;
            }
            b'X' | b'T' => {
                let len = u32::from_le_bytes(self.array()?);
                self.text(len.into())?;
            }
            0x8d => {
                let len = u64::from_le_bytes(self.array()?);
                self.text(len)?;
            }
            // Bytes: SHORT_BINBYTES, BINBYTES, BINBYTES8, BYTEARRAY8
            b'C' => {
                let [len] = self.array()?;
                self.take(len.into())?;
                self.stack.push(OPAQUE);
            }
            b'B' => {
                let len = u32::from_le_bytes(self.array()?);
                self.take(len.into())?;
                self.stack.push(OPAQUE);
            }
            0x8e | 0x96 => {
                let len = u64::from_le_bytes(self.array()?);
                self.take(len)?;
                self.stack.push(OPAQUE);
            }
            b')' => self.push(Node::Tuple(Box::default()))?,
            0x85..=0x87 => {
                let first = self.top(usize::from(opcode - 0x84))?;
                let items = self.stack.split_off(first).into();
                self.push(Node::Tuple(items))?;
            }
            b't' => {
                let items = self.pop_mark()?.into();
                self.push(Node::Tuple(items))?;
            }
            b']' => self.push(Node::List(Vec::new()))?,
            b'l' => {
                let items = self.pop_mark()?;
                self.push(Node::List(items))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.pop_mark()?;
                self.append(items)?;
            }
            b'}' => self.push(Node::Dict(Vec::new()))?,
            b'd' => {
                let items = self.pop_mark()?;
                self.push(Node::Dict(Vec::new()))?;
                self.set_items(items)?;
            }
            b's' => {
                let first = self.top(2)?;
                let items = self.stack.split_off(first);
                self.set_items(items)?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.set_items(items)?;
            }
            b'q' => {
                let [slot] = self.array()?;
                self.memoize(slot.into())?;
            }
            b'r' => {
                let slot = u32::from_le_bytes(self.array()?);
                self.memoize(slot)?;
            }
            b'p' => {
                let slot = self.slot()?;
                self.memoize(slot)?;
            }
            0x94 => {
                let slot =
                    u32::try_from(self.memo.len()).map_err(|_| "memo overflow".to_owned())?;
                self.memoize(slot)?;
            }
            b'h' => {
                let [slot] = self.array()?;
                self.recall(slot.into())?;
            }
            b'j' => {
                let slot = u32::from_le_bytes(self.array()?);
                self.recall(slot)?;
            }
            b'g' => {
                let slot = self.slot()?;
                self.recall(slot)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (self.node(module).clone(), self.node(name).clone()) {
                    (Node::Text(module), Node::Text(name)) => self.global(&module, &name)?,
                    _ => return Err("STACK_GLOBAL without two strings".to_owned()),
                }
            }
            b'Q' => self.persistent()?,
            b'R' => self.reduce()?,
            b'b' => {
                // State of a dictionary (`_metadata`) is dropped; nothing else may have any.
                let state = self.pop()?;
                let target = self.peek()?;
                if !matches!(self.node(target), Node::Dict(_)) || !is_plain(self.node(state)) {
                    return Err("opcode BUILD on something else than a dictionary".to_owned());
                }
            }
            _ => return Err(format!("opcode {}", opcode_name(opcode))),
        }
        Ok(None)
    }

    fn take(&mut self, len: u64) -> Step<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let taken = usize::try_from(len)
            .ok()
            .and_then(|len| rest.get(..len))
            .ok_or_else(|| "the stream ends in the middle of an instruction".to_owned())?;
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        Ok(*self.take(N as u64)?.first_chunk().expect("invariant: N bytes were taken"))
    }

    /// Text up to the next newline.
    fn line(&mut self) -> Step<&'a str> {
        let rest = &self.bytes[self.at..];
        let len = rest
            .iter()
            .position(|&byte| byte == b'\n')
            .ok_or_else(|| "a line of text without its end".to_owned())?;
        self.at += len + 1;
        std::str::from_utf8(&rest[..len]).map_err(|_| "a line of text is not UTF-8".to_owned())
    }

    fn slot(&mut self) -> Step<u32> {
        self.line()?.parse().map_err(|_| "a memo number is no number".to_owned())
    }

    fn text(&mut self, len: u64) -> Step<()> {
        let bytes = self.take(len)?;
        let text = String::from_utf8_lossy(bytes).into_owned();
        self.push(Node::Text(text.into()))
    }

    fn node(&self, id: Id) -> &Node {
        &self.nodes[id as usize]
    }

    fn push(&mut self, node: Node) -> Step<()> {
        if self.nodes.len() >= MAX_VALUES {
            return Err(format!("more than {MAX_VALUES} values"));
        }
        self.stack.push(self.nodes.len() as Id);
        self.nodes.push(node);
        Ok(())
    }

    /// Height of the stack below its top `count` values; marks may not be crossed.
    fn top(&self, count: usize) -> Step<usize> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack
            .len()
            .checked_sub(count)
            .filter(|&height| height >= floor)
            .ok_or_else(|| "the stack is empty".to_owned())
    }

    fn pop(&mut self) -> Step<Id> {
        let first = self.top(1)?;
        Ok(self.stack.split_off(first)[0])
    }

    fn peek(&self) -> Step<Id> {
        Ok(self.stack[self.top(1)?])
    }

    fn pop_mark(&mut self) -> Step<Vec<Id>> {
        let mark = self.marks.pop().ok_or_else(|| "no mark on the stack".to_owned())?;
        Ok(self.stack.split_off(mark))
    }

    fn append(&mut self, items: Vec<Id>) -> Step<()> {
        let target = self.peek()?;
        match &mut self.nodes[target as usize] {
            Node::List(list) => {
                list.extend(items);
                Ok(())
            }
            _ => Err("opcode APPEND on something else than a list".to_owned()),
        }
    }

    fn set_items(&mut self, items: Vec<Id>) -> Step<()> {
        let target = self.peek()?;
        let Node::Dict(entries) = &mut self.nodes[target as usize] else {
            return Err("opcode SETITEM on something else than a dictionary".to_owned());
        };
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err("a key without a value".to_owned());
        }
        entries.extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }

    fn memoize(&mut self, slot: u32) -> Step<()> {
        let top = self.peek()?;
        self.memo.insert(slot, top);
        Ok(())
    }

    fn recall(&mut self, slot: u32) -> Step<()> {
        let id = *self.memo.get(&slot).ok_or_else(|| format!("memo {slot} is empty"))?;
        self.stack.push(id);
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Step<()> {
        let global = Global::find(module, name).ok_or_else(|| {
            let shown: String = format!("{module}.{name}").chars().take(120).collect();
            format!(
                "the name `{}` is not one of those that rebuild tensors; save a plain state_dict, or \
                 convert the file to safetensors where you trust it",
                shown.escape_debug()
            )
        })?;
        self.push(Node::Global(global))
    }

    /// `("storage", type, key, location, count)` and, in old files, `None`.
    fn persistent(&mut self) -> Step<()> {
        let id = self.pop()?;
        let Node::Tuple(items) = self.node(id) else {
            return Err("a persistent id that is no tuple".to_owned());
        };
        let bad = || "a persistent id that describes no storage".to_owned();
        let [kind, class, key, _, count, rest @ ..] = &items[..] else { return Err(bad()) };
        if !matches!(self.node(*kind), Node::Text(text) if &**text == "storage") {
            return Err(bad());
        }
        if rest.len() > 1 || rest.iter().any(|&view| !matches!(self.node(view), Node::None)) {
            return Err("a view of another storage; save the file again with a newer torch".into());
        }
        let (Node::Global(Global::Storage(dtype)), Node::Text(key)) =
            (self.node(*class), self.node(*key))
        else {
            return Err(bad());
        };
        let storage = Storage { key: key.clone(), dtype: *dtype, numel: self.whole(*count)? };
        self.push(Node::Storage(storage))
    }

    fn reduce(&mut self) -> Step<()> {
        let (arguments, callee) = (self.pop()?, self.pop()?);
        let Node::Global(global) = *self.node(callee) else {
            return Err("opcode REDUCE on something that is no known name".to_owned());
        };
        let Node::Tuple(arguments) = self.node(arguments).clone() else {
            return Err("opcode REDUCE without a tuple of arguments".to_owned());
        };
        match (global, &arguments[..]) {
            (Global::OrderedDict, []) => self.push(Node::Dict(Vec::new())),
            (Global::OrderedDict, [pairs]) => {
                let pairs = self.pairs(*pairs)?;
                self.push(Node::Dict(pairs))
            }
            (Global::Size, [sizes]) => {
                self.stack.push(*sizes);
                Ok(())
            }
            (Global::Device, _) => {
                self.stack.push(OPAQUE);
                Ok(())
            }
            (Global::RebuildParameter, [data, _, _]) => {
                if !matches!(self.node(*data), Node::Tensor(_)) {
                    return Err("a parameter without a tensor".to_owned());
                }
                self.stack.push(*data);
                Ok(())
            }
            (Global::RebuildTensor, [storage, offset, shape, strides]) => {
                self.tensor([*storage, *offset, *shape, *strides], None)
            }
            (Global::RebuildTensorV2, [storage, offset, shape, strides, _, _, ..]) => {
                self.tensor([*storage, *offset, *shape, *strides], None)
            }
            (Global::RebuildTensorV3, [storage, offset, shape, strides, _, _, dtype, ..]) => {
                self.tensor([*storage, *offset, *shape, *strides], Some(*dtype))
            }
            _ => Err(format!("{global:?} called with {} arguments", arguments.len())),
        }
    }

    fn pairs(&self, list: Id) -> Step<Vec<(Id, Id)>> {
        let Node::List(items) = self.node(list) else {
            return Err("an OrderedDict of something else than pairs".to_owned());
        };
        let pair = |item: &Id| match self.node(*item) {
            Node::Tuple(pair) if pair.len() == 2 => Ok((pair[0], pair[1])),
            Node::List(pair) if pair.len() == 2 => Ok((pair[0], pair[1])),
            _ => Err("an OrderedDict of something else than pairs".to_owned()),
        };
        items.iter().map(pair).collect()
    }

    fn tensor(&mut self, parts: [Id; 4], dtype: Option<Id>) -> Step<()> {
        let [storage, offset, shape, strides] = parts;
        let Node::Storage(storage) = self.node(storage).clone() else {
            return Err("a tensor without a storage".to_owned());
        };
        let named = match dtype.map(|id| self.node(id)) {
            None => None,
            Some(Node::Global(Global::Type(Some(dtype)))) => Some(*dtype),
            Some(_) => return Err("a tensor of an unsupported element type".to_owned()),
        };
        let dtype =
            named.or(storage.dtype).ok_or_else(|| "a tensor without an element type".to_owned())?;
        let offset = self.whole(offset)?;
        let (shape, strides) = (self.wholes(shape)?, self.wholes(strides)?);
        self.push(Node::Tensor(Box::new(Tensor { storage, dtype, offset, shape, strides })))
    }

    fn whole(&self, id: Id) -> Step<u64> {
        match self.node(id) {
            Node::Int(x) => u64::try_from(*x).map_err(|_| format!("{x} where a size should be")),
            _ => Err("something else than a whole number where a size should be".to_owned()),
        }
    }

    fn wholes(&self, id: Id) -> Step<Vec<u64>> {
        let items = match self.node(id) {
            Node::Tuple(items) => &items[..],
            Node::List(items) => items,
            _ => return Err("something else than a tuple where a shape should be".to_owned()),
        };
        if items.len() > 64 {
            return Err(format!("a tensor of {} dimensions", items.len()));
        }
        items.iter().map(|&item| self.whole(item)).collect()
    }
}

/// State that may be dropped: a dictionary, or a tuple of dictionaries and nothing.
fn is_plain(node: &Node) -> bool {
    matches!(node, Node::Dict(_) | Node::None | Node::Tuple(_))
}

/// A little-endian two's-complement number of up to 255 bytes; those beyond 64 bits matter to nobody.
fn long(bytes: &[u8]) -> Node {
    if bytes.len() > 8 {
        return Node::Opaque;
    }
    let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
    let mut word = [if negative { 0xff } else { 0 }; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    Node::Int(i64::from_le_bytes(word))
}

/// Names of the instructions that are refused, for the message.
fn opcode_name(opcode: u8) -> String {
    let name = match opcode {
        b'i' => "INST (creates an object of any class)",
        b'o' => "OBJ (creates an object of any class)",
        0x81 => "NEWOBJ (creates an object of any class)",
        0x92 => "NEWOBJ_EX (creates an object of any class)",
        0x82..=0x84 => "EXT (a registered class)",
        b'P' => "PERSID (a persistent id in text)",
        b'S' | b'V' => "STRING/UNICODE (protocol 0 text)",
        0x8b => "LONG4 (a number of arbitrary length)",
        0x8f..=0x91 => "a set",
        0x97 | 0x98 => "an out-of-band buffer",
        _ => return format!("0x{opcode:02x}, which does not exist"),
    };
    format!("{name} is not needed for tensors")
}
