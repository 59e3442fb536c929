"""Prints the import graph of a package: nodes, edges, levels and circles, of its modules and of its folders.

python tools/import_graph.py [pyps] [--edges]

Every import counts, also those inside functions and those for annotations only: they are what a reader has to follow.
`make lint` checks the direction of the imports (pyproject.toml); this measures them, in any checkout, without
installing it.
"""

import argparse
import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

Graph = dict[str, set[str]]


def modules(package: Path) -> dict[str, Path]:
    """Return the files of a package by module name; folders that are links belong to it, too."""
    files: dict[str, Path] = {}
    for path in sorted(package.iterdir()):
        if path.is_dir() and (path / "__init__.py").exists():
            files |= {f"{package.name}.{name}": file for name, file in modules(path).items()}
        elif path.suffix == ".py":
            files[package.name if path.stem == "__init__" else f"{package.name}.{path.stem}"] = path
    return files


def imports(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules among `known` that one of them imports."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                target = f"{source}.{alias.name}"
                if target in known:
                    yield target
                # what neither is a module nor stands in the package's file is compiled
                elif source in known and (alias.name == "*" or alias.name in known[source].read_text(encoding="utf-8")):
                    yield source


def module_graph(package: Path) -> Graph:
    """Return the modules that each module of a package imports."""
    known = modules(package)
    return {name: set(imports(name, path, known)) - {name} for name, path in known.items()}


def folder_graph(graph: Graph) -> Graph:
    """Return the same graph with one node for each folder, and for each module that lies beside the folders."""
    top = {name: ".".join(name.split(".")[:2]) for name in graph}
    folders: Graph = {folder: set() for folder in top.values()}
    for name, targets in graph.items():
        folders[top[name]] |= {top[target] for target in targets} - {top[name]}
    return folders


def reachable(graph: Graph, start: str) -> set[str]:
    """Return everything that a node imports, directly or not; itself only if it is in a circle."""
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        if (node := waiting.pop()) not in seen:
            seen.add(node)
            waiting += graph[node]
    return seen


def circles(graph: Graph) -> list[list[str]]:
    """Return the groups of two or more nodes that all import each other, directly or not."""
    reach = {node: reachable(graph, node) for node in graph}
    groups = {tuple(sorted(m for m in reach[node] if node in reach[m])) for node in graph if node in reach[node]}
    return sorted(map(list, groups))


def levels(graph: Graph) -> int:
    """Return the length of the longest chain of imports, where a circle counts as one node."""
    reach = {node: reachable(graph, node) for node in graph}
    heights: dict[str, int] = {}
    for node in sorted(graph, key=lambda n: len(reach[n])):
        below = [heights[m] for m in reach[node] if node not in reach[m] and m in heights]
        heights[node] = max(below, default=0) + 1
    return max(heights.values(), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the import graph of a package.")
    parser.add_argument("package", type=Path, nargs="?", default=Path("pyps"), help="the package's folder")
    parser.add_argument("--edges", action="store_true", help="print every edge between folders, too")
    options = parser.parse_args()
    graph = module_graph(options.package)
    for kind, nodes in (("modules", graph), ("folders", folder_graph(graph))):
        groups = circles(nodes)
        edges = sum(map(len, nodes.values()))
        print(f"{kind}: {len(nodes)} nodes, {edges} edges, {levels(nodes)} levels, {len(groups)} circles")
        for group in groups:
            print(f"  {' ↔ '.join(group)}")
    if options.edges:
        for name, targets in folder_graph(graph).items():
            print(f"{name} → {', '.join(sorted(targets)) or 'nothing'}")


if __name__ == "__main__":
    main()
