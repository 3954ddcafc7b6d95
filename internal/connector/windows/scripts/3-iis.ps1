
function Open-Iis {
    $library = [IO.Path]::Combine([Environment]::SystemDirectory, 'inetsrv', 'Microsoft.Web.Administration.dll')
    if (-not [IO.File]::Exists($library)) { Fail 'iis-missing' $library }
    $null = [Reflection.Assembly]::LoadFrom($library)
    return New-Object Microsoft.Web.Administration.ServerManager
}

function Find-Site($manager, [string] $name) {
    foreach ($site in $manager.Sites) {
        if ($site.Name -eq $name) { return $site }
    }
    $names = @(foreach ($site in $manager.Sites) { $site.Name })
    Fail 'site-missing' ([string]::Join(', ', $names))
}

function Find-Binding($site, [string] $information) {
    foreach ($binding in $site.Bindings) {
        if ($binding.Protocol -eq 'https' -and $binding.BindingInformation -eq $information) { return $binding }
    }
    return $null
}

# Returns the entry of http.sys that a binding uses: address and port or, with SNI, port and host name.
function Get-Entry([string] $information, [int] $flags) {
    if (($flags -band 1) -eq 0) { return $information.Substring(0, $information.LastIndexOf(':')) }
    $parts = $information.Split(':')
    return [string]::Join(':', $parts, $parts.Length - 2, 2)
}

# Returns the other bindings that share the entry, except those of the same site that have the same name
# at another address.
function Get-Sharing($manager, $request, $existing, [int] $flags) {
    $entry = Get-Entry $request['binding'] $flags
    $named = $null -ne $existing -and ($flags -band 1) -ne 0
    foreach ($site in $manager.Sites) {
        foreach ($binding in $site.Bindings) {
            if ($binding.Protocol -ne 'https') { continue }
            if ((Get-Entry $binding.BindingInformation $binding.SslFlags) -ne $entry) { continue }
            if ($site.Name -eq $request['site'] -and ($named -or $binding.BindingInformation -eq $request['binding'])) { continue }
            [string]::Join(' ', @($site.Name, $binding.BindingInformation))
        }
    }
}

# Returns the thumbprints in use: by bindings of IIS and by other users of http.sys, such as WinRM
# itself. It only parses the thumbprints in netsh's output, since the text depends on the language.
function Get-Used($request) {
    if ($request['site'] -ne '') {
        foreach ($site in (Open-Iis).Sites) {
            foreach ($binding in $site.Bindings) {
                if ($binding.Protocol -eq 'https') { Get-Hex $binding.CertificateHash }
            }
        }
    }
    $printed = [string]::Join(' ', @(netsh.exe http show sslcert))
    foreach ($match in [regex]::Matches($printed, '\b[0-9A-Fa-f]{40}\b')) { $match.Value.ToUpperInvariant() }
}

function Set-Binding($request, [string] $thumbprint, [string] $name, [int] $flags) {
    $certificate = Find-Certificate (Open-Store $name 'LocalMachine' 'OpenExistingOnly, ReadOnly') $thumbprint
    if ($null -eq $certificate) { Fail 'former-missing' $thumbprint }
    $manager = Open-Iis
    $site = Find-Site $manager $request['site']
    $binding = Find-Binding $site $request['binding']
    if ($null -eq $binding) {
        $null = $site.Bindings.Add($request['binding'], $certificate.GetCertHash(), $name, [Microsoft.Web.Administration.SslFlags] $flags)
        $manager.CommitChanges()
        return
    }
    # Setting the binding's properties would not do: it has no effect on a binding without a certificate,
    # and setting only CertificateHash deletes the entry of http.sys and looks for the new certificate in
    # the old store (https://github.com/win-acme/win-acme/issues/371).
    $method = $binding.Methods['AddSslCertificate'].CreateInstance()
    $method.Input.SetAttributeValue('certificateHash', $thumbprint)
    $method.Input.SetAttributeValue('certificateStoreName', $name)
    $null = $method.Execute()
}

# Removes the certificate from a binding that had none, or the binding if it did not exist.
function Clear-Binding($request, [bool] $existed) {
    $manager = Open-Iis
    $site = Find-Site $manager $request['site']
    $binding = Find-Binding $site $request['binding']
    if ($null -eq $binding) { return }
    if ($existed) {
        $null = $binding.Methods['RemoveSslCertificate'].CreateInstance().Execute()
    } else {
        $site.Bindings.Remove($binding)
        $manager.CommitChanges()
    }
}

function Write-Binding($request) {
    $manager = Open-Iis
    $binding = Find-Binding (Find-Site $manager $request['site']) $request['binding']
    $bound = ''
    $flags = $request['ssl_flags']
    if ($null -ne $binding) {
        $bound = Get-Hex $binding.CertificateHash
        $flags = [int] $binding.SslFlags
    }
    if ($bound -eq $request['thumbprint'] -and $binding.CertificateStoreName -eq $request['store']) { return }
    if ($bound -ne $request['expected'] -and $bound -ne $request['thumbprint']) { Fail 'changed' $bound }
    if (($flags -band 2) -ne 0) { Fail 'central-store' '' }
    $sharing = @(Get-Sharing $manager $request $binding $flags)
    if ($sharing.Count -gt 0) { Fail 'sharing' ([string]::Join(', ', $sharing)) }
    Set-Binding $request $request['thumbprint'] $request['store'] $flags
}

function Restore-Binding($request) {
    $was = $request['was']
    $now = Get-State $request
    if ($now.binding -eq $was['binding'] -and $now.bound -eq $was['bound'] -and ($now.bound -eq '' -or $now.bound_store -eq $was['bound_store'])) { return }
    # A change that failed in the middle can leave a binding without a certificate.
    $ours = $now.bound -eq '' -or $now.bound -eq $request['thumbprint'] -or $now.bound -eq $was['thumbprint'] -or $now.ours -contains $now.bound
    if (-not $ours -or ($was['binding'] -ne '' -and $now.binding -eq '')) { Fail 'changed' $now.bound }
    if ($was['bound'] -eq '') {
        Clear-Binding $request ($was['binding'] -ne '')
    } else {
        Set-Binding $request $was['bound'] $was['bound_store'] $now.bound_flags
    }
}
