"How the notebooks read, in numbers: python scripts/book.py [--each] [NOTEBOOK ...]"
import argparse
import ast
import json
import re
from pathlib import Path
from statistics import median

NBS = Path(__file__).parent.parent/'nbs'
MAGIC = re.compile(r'^[%!].*$', re.M)


def source(cell): return ''.join(cell['source'])


def directives(text): return set(re.findall(r'^#\|\s*(\w+)', text, re.M))


def exports(cell): return cell['cell_type'] == 'code' and bool(directives(source(cell)) & {'export', 'exports', 'exporti'})


def visible(cell): return cell['cell_type'] == 'code' and not exports(cell) and not directives(source(cell)) & {'hide', 'default_exp'}


def tree(text): return ast.parse(MAGIC.sub('', text))


def lines(text): return [l for l in text.splitlines() if l.strip() and not l.startswith('#|')]


def decorators(node): return {ast.unparse(d).partition('(')[0] for d in node.decorator_list}


def is_patch(node): return isinstance(node, ast.FunctionDef) and 'patch' in decorators(node)


def functions(text):
    "Every function of a cell as (is a method, definition): top-level ones, methods in a class, and those that `@patch` adds"
    for node in tree(text).body:
        if isinstance(node, ast.FunctionDef): yield is_patch(node), node
        elif isinstance(node, ast.ClassDef): yield from ((True, n) for n in node.body if isinstance(n, ast.FunctionDef))


def is_public(name): return not name.startswith('_')


def symbols(text):
    "Public functions and classes that a cell defines; methods that `@patch` adds are its own `methods`"
    return [n.name for n in tree(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and is_public(n.name) and not is_patch(n)]


def methods(text): return [n.name for n in tree(text).body if is_patch(n) and is_public(n.name)]


def names(text):
    "Every name and attribute in a cell"
    nodes = list(ast.walk(tree(text)))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


def checks(text):
    "Asserts, and calls of functions named test_*"
    nodes = list(ast.walk(tree(text)))
    called = [n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    return sum(isinstance(n, ast.Assert) for n in nodes) + sum(c.startswith('test_') for c in called)


def parameters(text):
    "Whether each parameter of a public function or constructor of a cell has a comment beside or above it"
    rows, found = text.splitlines(), []
    for _, f in functions(text):
        if not is_public(f.name) and f.name != '__init__': continue
        args = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs, *filter(None, (f.args.vararg, f.args.kwarg))]
        for a in args:
            if a.arg in ('self', 'cls'): continue
            beside, above = rows[a.end_lineno - 1], rows[a.lineno - 2].strip() if a.lineno > 1 else ''
            found.append('#' in beside or above.startswith('#') and not above.startswith('#|'))
    return found


def bare(text):
    "Lines of a cell if each signature were one line, whatever its docments take"
    heads = [f.body[0].lineno - f.lineno for _, f in functions(text)]
    return len(lines(text)) - sum(n - 1 for n in heads if n > 1)


def pictures(cell):
    "Pictures that a reader sees: of stored outputs, files, and diagrams"
    if cell['cell_type'] == 'markdown': return len(re.findall(r'!\[[^\]]*\]\(|```\{?mermaid|<svg', source(cell)))
    if 'hide' in directives(source(cell)): return 0
    return sum(any(k.startswith('image/') for k in o.get('data', {})) for o in cell.get('outputs', []))


def grown(text):
    "Classes that a cell begins or that it grows by `@patch`"
    nodes = tree(text).body
    return {n.name for n in nodes if isinstance(n, ast.ClassDef)} | {ast.unparse(n.args.args[0].annotation) for n in nodes if is_patch(n)}


def followed(cell, later):
    "Whether an export cell is followed at once by one that uses it; a class that grows on in the next cell waits for the end of that"
    own, classes = {*symbols(source(cell)), *methods(source(cell))}, grown(source(cell))
    for after in later:
        if visible(after): return bool((own | classes) & names(source(after))) or 'forward' in own # which is called by no name
        patched = exports(after) and grown(source(after)) & classes and not symbols(source(after))
        if not patched: return False
        own |= {*methods(source(after))}
    return False


def measure(nb):
    "Raw counts of one notebook"
    cells = nb['cells']
    code = [c for c in cells if c['cell_type'] == 'code']
    shown = [source(c) for c in code if visible(c)]
    out = dict(sizes=[], bare=[], own=[], used=[], follows=[], checks=sum(map(checks, shown)), pictures=sum(map(pictures, cells)),
               long=0, lines=0, docments=[], functions=[], methods=[])
    seen = set().union(*map(names, shown)) if shown else set()
    for i, c in enumerate(code):
        if not exports(c): continue
        text = source(c)
        if all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree(text).body): continue
        own, patched = symbols(text), methods(text)
        out['sizes'].append(len(lines(text)))
        out['bare'].append(bare(text))
        out['long'] += sum(len(l) > 120 for l in lines(text))
        out['lines'] += len(lines(text))
        out['own'] += own
        out['used'] += [s in seen for s in own]
        if own or patched: out['follows'].append(followed(c, code[i+1:]))
        out['docments'] += parameters(text)
        for is_method, f in functions(text):
            if is_public(f.name): out['methods' if is_method else 'functions'].append(bool(ast.get_docstring(f)))
    return out


def total(counts):
    "Counts of several notebooks as one"
    return {k: sum((c[k] for c in counts), [] if isinstance(counts[0][k], list) else 0) for k in counts[0]}


def share(flags): return round(100*sum(flags)/len(flags)) if flags else 100


def spread(sizes):
    "Median / nine tenths / largest"
    sizes = sorted(sizes) or [0]
    return f"{median(sizes):g} / {sizes[min(len(sizes) - 1, int(.9*len(sizes)))]} / {sizes[-1]}"


def table_row(m, notebooks=1):
    "The numbers of the table, from counts"
    return {'lines per export cell': spread(m['sizes']), 'signatures as one line': spread(m['bare']),
            'used, %': share(m['used']), 'followed, %': share(m['follows']),
            'checks per symbol': round(m['checks']/max(len(m['own']), 1), 1), 'pictures': round(m['pictures']/notebooks, 1),
            'over 120': m['long'], 'docments, %': share(m['docments']),
            'docstrings, %': f"{share(m['functions'])} / {share(m['methods'])}"}


def exporting(paths):
    "Notebooks that export something, by name"
    found = {p.stem: json.loads(p.read_text(encoding='utf-8')) for p in paths if not p.name.startswith('_')}
    return {n: nb for n, nb in found.items() if any(exports(c) for c in nb['cells'])}


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('notebooks', nargs='*', help='stems, such as 33_var; all that export by default')
    p.add_argument('--each', action='store_true', help='one row for each notebook too')
    args = p.parse_args()
    counts = {n: measure(nb) for n, nb in exporting(sorted(NBS.glob('*.ipynb'))).items() if not args.notebooks or n in args.notebooks}
    rows = {n: table_row(m) for n, m in counts.items()} if args.each or args.notebooks else {}
    rows['all'] = table_row(total([*counts.values()]), len(counts))
    print('| notebook | ' + ' | '.join(rows['all']) + ' |\n' + '|---'*(len(rows['all']) + 1) + '|')
    for n, r in rows.items(): print(f'| {n} | ' + ' | '.join(map(str, r.values())) + ' |')


if __name__ == '__main__': main()
