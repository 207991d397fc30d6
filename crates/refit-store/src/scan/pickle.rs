//! Pickle opcodes, walked and never executed.
//!
//! The walk keeps the stack machine's state symbolically: which value is a callable by name, which is a string, what
//! the memo holds. So a callable that is pushed by `STACK_GLOBAL` from memoised strings is known by name, and one
//! whose name cannot be told is refused. Opcodes and callables outside the lists below end the walk.

use std::io::{BufReader, Read};
use std::path::Path;
use std::rc::Rc;

use super::{Findings, Severity};

/// Callables that rebuild tensors and plain containers.
const CALLABLES: &[(&str, &str)] = &[
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch._utils", "_rebuild_qtensor"),
    ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.serialization", "_get_layout"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
];

/// Names that stand as values (storage classes and element types) and are never called.
const VALUES: &[(&str, &[&str])] = &[
    (
        "torch",
        &[
            "DoubleStorage",
            "FloatStorage",
            "HalfStorage",
            "BFloat16Storage",
            "LongStorage",
            "IntStorage",
            "ShortStorage",
            "CharStorage",
            "ByteStorage",
            "BoolStorage",
            "ComplexDoubleStorage",
            "ComplexFloatStorage",
            "QUInt8Storage",
            "QInt8Storage",
            "QInt32Storage",
            "float64",
            "float32",
            "float16",
            "bfloat16",
            "int64",
            "int32",
            "int16",
            "int8",
            "uint8",
            "uint16",
            "uint32",
            "uint64",
            "bool",
            "complex64",
            "complex128",
            "float8_e4m3fn",
            "float8_e5m2",
            "per_tensor_affine",
            "per_channel_affine",
            "strided",
            "sparse_coo",
        ],
    ),
    ("torch.storage", &["UntypedStorage", "TypedStorage"]),
];

/// Element sizes of legacy storages, for the bytes that follow the pickles.
const STORAGE_BYTES: &[(&str, u64)] = &[
    ("DoubleStorage", 8),
    ("LongStorage", 8),
    ("ComplexFloatStorage", 8),
    ("ComplexDoubleStorage", 16),
    ("FloatStorage", 4),
    ("IntStorage", 4),
    ("QInt32Storage", 4),
    ("HalfStorage", 2),
    ("BFloat16Storage", 2),
    ("ShortStorage", 2),
    ("CharStorage", 1),
    ("ByteStorage", 1),
    ("BoolStorage", 1),
    ("QUInt8Storage", 1),
    ("QInt8Storage", 1),
    ("UntypedStorage", 1),
];

/// First value of a legacy PyTorch file.
const LEGACY_MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

/// Bounds against streams made to exhaust memory.
const MAX_STACK: usize = 1 << 22;
const MAX_TEXT: u64 = 1 << 20;

/// Where a stream lies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Container {
    /// A file of its own, possibly a legacy PyTorch file.
    File,
    /// A member of an archive: one pickle and nothing behind it.
    Member,
}

/// A value as far as the walk needs to know it.
#[derive(Debug, Clone)]
enum Value {
    Mark,
    Text(Rc<str>),
    Int(i64),
    Long(Rc<[u8]>),
    /// A global, and whether it may be called.
    Global(Rc<str>, bool),
    Tuple(Rc<[Value]>),
    /// A list or anything else, harmless by construction.
    List(Rc<std::cell::RefCell<Vec<Value>>>),
    Other,
}

/// Why a walk ended early.
struct Refused {
    offset: u64,
    what: String,
}

/// Protocol 0 begins with an opcode in ASCII; these beginnings are no text that a model directory holds.
pub(super) fn looks_like_text_pickle(head: &[u8]) -> bool {
    let line = |rest: &[u8]| rest.iter().position(|b| *b == b'\n');
    match head {
        // GLOBAL `module\nname\n`: two identifiers on lines of their own.
        [b'c' | b'i', rest @ ..] | [b'(', b'c' | b'i', rest @ ..] => {
            let Some(end) = line(rest) else { return false };
            let word = |text: &[u8]| {
                !text.is_empty()
                    && text.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.'))
            };
            let after = &rest[end + 1..];
            word(&rest[..end]) && line(after).is_some_and(|end| word(&after[..end]))
        }
        [
            b'(' | b']' | b'}',
            b'l' | b'd' | b't' | b'p' | b'q' | b'(',
            b'p' | b'q' | b'0'..=b'9' | b'.' | b'c',
            ..,
        ] => true,
        _ => false,
    }
}

pub(super) fn scan(path: &Path, findings: &mut Findings<'_>) {
    match std::fs::File::open(path) {
        Ok(file) => scan_reader(file, Container::File, findings),
        Err(error) => findings.add(Severity::Danger, format!("cannot be read: {error}")),
    }
}

pub(super) fn scan_reader(reader: impl Read, container: Container, findings: &mut Findings<'_>) {
    let mut walker = Walker {
        bytes: BufReader::with_capacity(1 << 16, reader),
        offset: 0,
        stack: Vec::new(),
        memo: std::collections::HashMap::new(),
        storages: std::collections::BTreeMap::new(),
    };
    if let Err(refused) = walker.whole(container) {
        findings.at(Severity::Danger, Some(refused.offset), refused.what);
    }
}

struct Walker<R> {
    bytes: BufReader<R>,
    offset: u64,
    stack: Vec<Value>,
    memo: std::collections::HashMap<u64, Value>,
    /// Legacy storages by key: bytes of one element.
    storages: std::collections::BTreeMap<String, u64>,
}

type Walk<T> = Result<T, Refused>;

impl<R: Read> Walker<R> {
    fn refuse<T>(&self, what: impl Into<String>) -> Walk<T> {
        Err(Refused { offset: self.offset, what: what.into() })
    }

    /// One pickle, or a legacy PyTorch file's five with its storages, up to the end of the stream.
    fn whole(&mut self, container: Container) -> Walk<()> {
        let first = self.pickle()?;
        let legacy = container == Container::File
            && matches!(&first, Value::Long(bytes) if **bytes == LEGACY_MAGIC);
        if legacy {
            let version = self.pickle()?;
            if !matches!(version, Value::Int(1001)) {
                return self.refuse("a PyTorch file of an unknown protocol");
            }
            self.pickle()?; // the machine that wrote it
            self.pickle()?; // the tensors
            let keys = self.pickle()?;
            self.storages(&keys)?;
        }
        match self.skip(1) {
            Err(_) => Ok(()),
            Ok(()) => {
                self.offset -= 1;
                self.refuse("data stands behind the end of the pickle, where another can hide")
            }
        }
    }

    /// The raw storages behind a legacy file's pickles.
    fn storages(&mut self, keys: &Value) -> Walk<()> {
        let Value::List(keys) = keys else { return self.refuse("the list of storages is no list") };
        for key in keys.borrow().iter() {
            let Value::Text(key) = key else { return self.refuse("a storage's key is no string") };
            let Some(&element) = self.storages.get(&**key) else {
                return self.refuse(format!("storage `{key}` belongs to no tensor"));
            };
            let count = u64::from_le_bytes(self.take::<8>()?);
            let Some(bytes) = count.checked_mul(element) else {
                return self.refuse("a storage's size overflows");
            };
            self.skip(bytes)?;
        }
        Ok(())
    }

    fn skip(&mut self, bytes: u64) -> Walk<()> {
        let skipped = std::io::copy(&mut (&mut self.bytes).take(bytes), &mut std::io::sink());
        match skipped {
            Ok(n) if n == bytes => {
                self.offset += n;
                Ok(())
            }
            Ok(_) => self.refuse("the stream is cut off"),
            Err(error) => self.refuse(format!("cannot be read: {error}")),
        }
    }

    fn take<const N: usize>(&mut self) -> Walk<[u8; N]> {
        let mut bytes = [0; N];
        match self.bytes.read_exact(&mut bytes) {
            Ok(()) => {
                self.offset += N as u64;
                Ok(bytes)
            }
            Err(_) => self.refuse("the stream is cut off"),
        }
    }

    fn byte(&mut self) -> Walk<u8> {
        Ok(self.take::<1>()?[0])
    }

    /// A string of known length. Long ones are skipped: no name is that long.
    fn text(&mut self, len: u64) -> Walk<Value> {
        if len > MAX_TEXT {
            self.skip(len)?;
            return Ok(Value::Other);
        }
        let mut bytes = vec![0; len as usize];
        if self.bytes.read_exact(&mut bytes).is_err() {
            return self.refuse("the stream is cut off");
        }
        self.offset += len;
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Value::Text(text.into())),
            // Python 2 strings may hold any bytes; as a name they are refused later.
            Err(_) => Ok(Value::Other),
        }
    }

    /// Up to the end of the line, as protocol 0 writes arguments.
    fn line(&mut self) -> Walk<String> {
        let mut bytes = Vec::new();
        loop {
            match self.byte()? {
                b'\n' => {
                    return String::from_utf8(bytes).or_else(|_| self.refuse("a line is no text"));
                }
                byte if (bytes.len() as u64) < MAX_TEXT => bytes.push(byte),
                _ => return self.refuse("a line never ends"),
            }
        }
    }

    fn push(&mut self, value: Value) -> Walk<()> {
        if self.stack.len() >= MAX_STACK {
            return self.refuse("the stack grows without end");
        }
        self.stack.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Walk<Value> {
        match self.stack.pop() {
            Some(Value::Mark) | None => self.refuse("the stack runs empty"),
            Some(value) => Ok(value),
        }
    }

    fn pop_to_mark(&mut self) -> Walk<Vec<Value>> {
        match self.stack.iter().rposition(|value| matches!(value, Value::Mark)) {
            Some(mark) => {
                let values = self.stack.split_off(mark + 1);
                self.stack.pop();
                Ok(values)
            }
            None => self.refuse("a mark is missing"),
        }
    }

    fn remember(&mut self, key: u64) -> Walk<()> {
        let Some(top) = self.stack.last().filter(|value| !matches!(value, Value::Mark)).cloned()
        else {
            return self.refuse("nothing to remember");
        };
        if self.memo.len() >= MAX_STACK {
            return self.refuse("the memo grows without end");
        }
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Walk<()> {
        match self.memo.get(&key).cloned() {
            Some(value) => self.push(value),
            None => self.refuse(format!("memo entry {key} was never written")),
        }
    }

    /// A global by name: refused unless it is on a list.
    fn global(&mut self, module: &str, name: &str) -> Walk<()> {
        let value = if CALLABLES.contains(&(module, name)) {
            Value::Global(format!("{module}.{name}").into(), true)
        } else if VALUES.iter().any(|(m, names)| *m == module && names.contains(&name)) {
            Value::Global(name.into(), false)
        } else {
            return self.refuse(format!(
                "`{module}.{name}` is not among the callables that rebuild tensors"
            ));
        };
        self.push(value)
    }

    /// `callable(*arguments)`.
    fn call(&mut self, callable: &Value, arguments: &Value) -> Walk<()> {
        match callable {
            Value::Global(_, true) => {}
            Value::Global(name, false) => {
                return self.refuse(format!("`{name}` is called, though it is only a value"));
            }
            _ => return self.refuse("something is called whose name cannot be told"),
        }
        if !matches!(arguments, Value::Tuple(_)) {
            return self.refuse("the arguments of a call are no tuple");
        }
        self.push(Value::Other)
    }

    /// `('storage', class, key, location, count)`: a reference to raw bytes.
    fn persistent(&mut self, id: &Value) -> Walk<()> {
        let parts: &[Value] = if let Value::Tuple(parts) = id { parts } else { &[] };
        match parts {
            [Value::Text(kind), Value::Global(class, false), Value::Text(key), ..]
                if **kind == *"storage" =>
            {
                let Some((_, bytes)) = STORAGE_BYTES.iter().find(|(name, _)| *name == &**class)
                else {
                    return self.refuse(format!("`{class}` is no storage"));
                };
                self.storages.insert(key.to_string(), *bytes);
                self.push(Value::Other)
            }
            _ => self.refuse("a persistent reference to something other than a storage"),
        }
    }

    /// Walks to `STOP` and returns what the pickle stands for.
    fn pickle(&mut self) -> Walk<Value> {
        self.stack.clear();
        self.memo.clear();
        let mut first = true;
        loop {
            let at = self.offset;
            let opcode = self.byte()?;
            if let Some(value) =
                self.step(opcode, first).map_err(|refused| Refused { offset: at, ..refused })?
            {
                return Ok(value);
            }
            first = false;
        }
    }

    /// One opcode; the value, at `STOP`.
    fn step(&mut self, opcode: u8, first: bool) -> Walk<Option<Value>> {
        match opcode {
            0x80 => {
                let protocol = self.byte()?;
                if protocol > 5 || !first {
                    return self
                        .refuse(format!("protocol {protocol} in a place where none belongs"));
                }
            }
            0x95 => self.skip(8)?, // FRAME: how much follows is read either way
            b'.' => {
                let value = self.pop()?;
                return if self.stack.is_empty() {
                    Ok(Some(value))
                } else {
                    self.refuse("values are left on the stack")
                };
            }
            b'(' => self.push(Value::Mark)?,
            b'0' => {
                // POP takes a mark, too.
                if self.stack.pop().is_none() {
                    return self.refuse("the stack runs empty");
                }
            }
            b'1' => drop(self.pop_to_mark()?),
            b'2' => {
                let top = self.pop()?;
                self.push(top.clone())?;
                self.push(top)?;
            }
            // Constants and numbers.
            b'N' | 0x88 | 0x89 => self.push(Value::Other)?,
            b'J' => {
                let int = i32::from_le_bytes(self.take()?);
                self.push(Value::Int(int.into()))?;
            }
            b'K' => {
                let int = self.byte()?;
                self.push(Value::Int(int.into()))?;
            }
            b'M' => {
                let int = u16::from_le_bytes(self.take()?);
                self.push(Value::Int(int.into()))?;
            }
            b'I' | b'L' => {
                let line = self.line()?;
                let int = line.trim_end_matches('L').parse().map_or(Value::Other, Value::Int);
                self.push(int)?;
            }
            b'F' => {
                self.line()?;
                self.push(Value::Other)?;
            }
            b'G' => {
                self.skip(8)?;
                self.push(Value::Other)?;
            }
            0x8a => {
                let len = usize::from(self.byte()?);
                let bytes: Vec<u8> = (0..len).map(|_| self.byte()).collect::<Walk<_>>()?;
                let int = <[u8; 8]>::try_from(sign_extended(&bytes)).map(i64::from_le_bytes);
                self.push(if len <= 8 {
                    int.map_or(Value::Other, Value::Int)
                } else {
                    Value::Long(bytes.into())
                })?;
            }
            // Strings and bytes.
            b'X' | b'T' => {
                let len = u32::from_le_bytes(self.take()?);
                let text = self.text(len.into())?;
                self.push(text)?;
            }
            0x8c | b'U' => {
                let len = self.byte()?;
                let text = self.text(len.into())?;
                self.push(text)?;
            }
            0x8d => {
                let len = u64::from_le_bytes(self.take()?);
                let text = self.text(len)?;
                self.push(text)?;
            }
            b'V' | b'S' => {
                let line = self.line()?;
                // Escapes could spell any name: only text without them is known.
                let quoted =
                    line.strip_prefix(['\'', '"']).and_then(|t| t.strip_suffix(['\'', '"']));
                let text = if opcode == b'S' { quoted.unwrap_or("\\") } else { &line };
                let known = !text.contains('\\');
                self.push(if known { Value::Text(text.into()) } else { Value::Other })?;
            }
            b'B' => {
                let len = u32::from_le_bytes(self.take()?);
                self.skip(len.into())?;
                self.push(Value::Other)?;
            }
            b'C' => {
                let len = self.byte()?;
                self.skip(len.into())?;
                self.push(Value::Other)?;
            }
            0x8e | 0x96 => {
                let len = u64::from_le_bytes(self.take()?);
                self.skip(len)?;
                self.push(Value::Other)?;
            }
            // Containers.
            b')' => self.push(Value::Tuple(Rc::new([])))?,
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Tuple(items.into()))?;
            }
            0x85..=0x87 => {
                let count = usize::from(opcode - 0x84);
                let mut items = (0..count).map(|_| self.pop()).collect::<Walk<Vec<_>>>()?;
                items.reverse();
                self.push(Value::Tuple(items.into()))?;
            }
            b']' => self.push(Value::List(Rc::default()))?,
            b'l' => {
                let items = self.pop_to_mark()?;
                self.push(Value::List(Rc::new(items.into())))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            b'}' | 0x8f => self.push(Value::Other)?,
            b'd' | 0x91 => {
                self.pop_to_mark()?;
                self.push(Value::Other)?;
            }
            b's' => {
                self.pop()?;
                self.pop()?;
                self.filled()?;
            }
            b'u' | 0x90 => {
                self.pop_to_mark()?;
                self.filled()?;
            }
            // Memo.
            b'p' => {
                let line = self.line()?;
                let Ok(key) = line.parse() else { return self.refuse("a memo key is no number") };
                self.remember(key)?;
            }
            b'q' => {
                let key = self.byte()?;
                self.remember(key.into())?;
            }
            b'r' => {
                let key = u32::from_le_bytes(self.take()?);
                self.remember(key.into())?;
            }
            0x94 => self.remember(self.memo.len() as u64)?,
            b'g' => {
                let line = self.line()?;
                let Ok(key) = line.parse() else { return self.refuse("a memo key is no number") };
                self.recall(key)?;
            }
            b'h' => {
                let key = self.byte()?;
                self.recall(key.into())?;
            }
            b'j' => {
                let key = u32::from_le_bytes(self.take()?);
                self.recall(key.into())?;
            }
            // Callables.
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(&module, &name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (module, name) {
                    (Value::Text(module), Value::Text(name)) => self.global(&module, &name)?,
                    _ => return self.refuse("a callable whose name is computed"),
                }
            }
            b'R' | 0x81 => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                self.call(&callable, &arguments)?;
            }
            b'b' => {
                self.pop()?;
                // State set on a class or function would change it for the whole program.
                if !matches!(self.stack.last(), Some(Value::Other)) {
                    return self.refuse("state is set on something that no call made");
                }
            }
            b'Q' => {
                let id = self.pop()?;
                self.persistent(&id)?;
            }
            _ => {
                let name = match opcode {
                    b'i' => "INST",
                    b'o' => "OBJ",
                    0x92 => "NEWOBJ_EX",
                    b'P' => "PERSID",
                    0x82..=0x84 => "EXT",
                    0x97 | 0x98 => "an out-of-band buffer",
                    0x8b => "LONG4",
                    _ => "unknown",
                };
                return self.refuse(format!(
                    "opcode 0x{opcode:02x} ({name}) is not among those that rebuild tensors"
                ));
            }
        }
        Ok(None)
    }

    fn append(&mut self, items: Vec<Value>) -> Walk<()> {
        match self.stack.last() {
            Some(Value::List(list)) => {
                // Only a legacy file's list of keys is looked into; nothing else needs its items.
                let mut list = list.borrow_mut();
                if list.len() + items.len() < MAX_STACK {
                    // A list inside itself would never be freed.
                    list.extend(
                        items.into_iter().map(|item| {
                            if let Value::List(_) = item { Value::Other } else { item }
                        }),
                    );
                }
                Ok(())
            }
            Some(Value::Other) => Ok(()),
            _ => self.refuse("items are appended to something that is no list"),
        }
    }

    fn filled(&mut self) -> Walk<()> {
        match self.stack.last() {
            Some(Value::Other) => Ok(()),
            _ => self.refuse("items are set on something that is no dictionary"),
        }
    }
}

/// Little-endian two's complement, widened to eight bytes.
fn sign_extended(bytes: &[u8]) -> Vec<u8> {
    let fill = if bytes.last().is_some_and(|last| last & 0x80 != 0) { 0xff } else { 0 };
    bytes.iter().copied().chain(std::iter::repeat(fill)).take(8.max(bytes.len())).collect()
}
